"""Charts of the page of results, drawn by matplotlib from the records.

The files are the same on every call: no date, fixed names of their parts. Each
holds the digest of the records that it shows.
"""

import functools
import io
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullFormatter,
)

from benchmarks import records, results_studies
from benchmarks.records import Record
from benchmarks.results_format import count

# Okabe and Ito: colour-blind eyes tell them apart.
BLUE, ORANGE, GREEN, GREY, INK = (
  '#0072b2',
  '#d55e00',
  '#009e73',
  '#8a8f94',
  '#222222',
)
STYLE = {
  'figure.facecolor': 'white',
  'savefig.facecolor': 'white',
  'axes.edgecolor': '#666666',
  'axes.labelcolor': INK,
  'axes.titlesize': 10,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.labelsize': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#e4e7ea',
  'text.color': INK,
  'xtick.labelsize': 8.5,
  'ytick.labelsize': 8.5,
  'font.family': 'sans-serif',
  'svg.fonttype': 'none',
  'svg.hashsalt': 'clusterq-jax',
}
_TITLES = {
  'class_terms': 'Class terms: variants differ about as much as seeds do',
  'ideas': 'Ideas of the recipe, one left out at a time',
  'many_classes': 'Some of the same ideas, with ten times the classes',
}
_DATA = {
  'cifar10_resnet20_fast': 'CIFAR-10',
  'cifar100_variant': 'CIFAR-100',
}
_PANELS = [
  (bits, of, unit)
  for bits in results_studies.ABLATED_BITS
  for of, unit in (('drops', 'drop, points'), ('divergences', 'KL, nats'))
]


def _time_records() -> tuple[list[Record], list[Record]]:
  runs = records.read('time_to_accuracy')
  first = runs[0]
  return runs, records.read(
    'published', group='drop', config=first['config'], bits=first['bits']
  )


def _draw_run(axes: Axes, run: Record, targets: list[Record], color: str):
  """Draws the way of a trained student, from target to target to its end."""
  times = [run['reached_s'][t['method']] for t in targets]
  x = [*times, run['end_s']]
  y = [*(t['drop'] for t in targets), run['drop']]
  axes.plot(x, y, color=color, linewidth=1.8)
  axes.plot(x[:-1], y[:-1], 'v', color=color, markersize=7)
  axes.plot(x[-1:], y[-1:], 'o', color=color, markersize=7)


def drop_against_time() -> Figure:
  """Draws the drop of each method against its seconds, beside the published."""
  runs, targets = _time_records()
  figure = Figure(figsize=(8.4, 5.0), layout='constrained')
  axes = figure.subplots()
  right = 1.4 * max(r['end_s'] for r in runs)
  for target in targets:
    axes.axhline(target['drop'], color=INK, linewidth=1, linestyle='--')
    text = f"{target['method']}'s drop, quoted: {target['drop']:.2f} points"
    axes.text(right * 0.995, target['drop'] * 1.03, text, fontsize=8.5,
              ha='right', va='bottom')  # fmt: skip
  colors = iter((BLUE, ORANGE))
  for run in runs:
    name, at = run['method'], (run['end_s'], run['drop'])
    color = next(colors) if run['trained'] else GREEN
    if run['trained']:
      _draw_run(axes, run, targets, color)
    else:
      axes.plot(*at, 's', color=color, markersize=6)
    axes.annotate(
      f'{name}:\n{run["drop"]:.2f} points, {run["end_s"]} s',
      at,
      xytext=(9, 0),
      textcoords='offset points',
      va='center',
      fontsize=8.5,
      color=color,
    )
  config = runs[0]
  axes.set(
    xlim=(0, right),
    yscale='log',
    ylim=(0.4, 1.25 * max(r['drop'] for r in runs)),
    xlabel='time without compilation and evaluation, s',
    ylabel='drop of top-1 accuracy, percentage points (log scale)',
    title=f'{_DATA[config["config"]]}, ResNet-20, {config["bits"]}: '
    f'drop against time on {count(config["machine"]["cores"], "CPU core")}',
  )
  axes.set_yticks([0.5, 1, 2, 5, 10], ['0.5', '1', '2', '5', '10'])
  axes.yaxis.set_minor_formatter(NullFormatter())
  marks = [
    Line2D([], [], color=GREY, marker='v', label='first evaluation at or '
           'below a quoted drop'),
    Line2D([], [], color=GREY, marker='o', label='end of training; '
           'straight lines join what was recorded'),
    Line2D([], [], color=GREEN, marker='s', linestyle='',
           label='student without training'),
  ]  # fmt: skip
  axes.legend(
    handles=marks,
    fontsize=8.5,
    frameon=False,
    loc='upper right',
    bbox_to_anchor=(1, 0.97),
  )
  return figure


def _scale(axes: Axes, axis: str, values: list[float]) -> None:
  """Makes an axis logarithmic if its values differ by a factor above 4."""
  lines = axes.xaxis if axis == 'x' else axes.yaxis
  if max(values) < 4 * min(values):
    lines.set_major_locator(MaxNLocator(4))
    return
  axes.set(**{f'{axis}scale': 'log'})
  lines.set_major_locator(LogLocator(subs=(1, 2, 5)))
  lines.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
  lines.set_minor_formatter(NullFormatter())


def _paint(group: str, name: str, bits: str, of: str) -> tuple[str, str]:
  """Chooses colour and marker of a variant.

  Returns:
    Those of the first variant of the group; those of a variant of which every
    seed is worse than every seed of the first; those of any other variant.
  """
  first = next(iter(results_studies.GROUPS[group][1]))
  if name == first:
    return INK, 'D'
  base, own = (
    results_studies.ends(group, n, bits, of).values() for n in (first, name)
  )
  return (ORANGE, 's') if min(own) > max(base) else (BLUE, 'o')


def _draw_ends(axes: Axes, group: str, bits: str, of: str) -> None:
  """Draws the last step of every variant: each seed, and their mean."""
  names = list(results_studies.GROUPS[group][1])
  values = {
    n: list(results_studies.ends(group, n, bits, of).values()) for n in names
  }
  base = statistics.mean(values[names[0]])
  axes.axvline(base, color=INK, linewidth=1, linestyle='--')
  for row, (name, some) in enumerate(values.items()):
    color, marker = _paint(group, name, bits, of)
    axes.plot(some, [row] * len(some), '|', color=GREY, markersize=9)
    axes.plot(statistics.mean(some), row, marker, color=color, markersize=6)
  axes.set_yticks(range(len(names)), results_studies.GROUPS[group][1].values())
  axes.set_ylim(len(names) - 0.5, -0.5)
  _scale(axes, 'x', [v for some in values.values() for v in some])


def _draw_courses(axes: Axes, group: str, bits: str, of: str) -> None:
  """Draws the mean of every variant along the student's steps."""
  runs = [r for r in results_studies.ablated(group) if r['bits'] == bits]
  everything = []
  for name in reversed(results_studies.GROUPS[group][1]):
    some = [r for r in runs if r['variant'] == name]
    means = [*map(statistics.mean, zip(*(r[of] for r in some), strict=True))]
    steps = [some[0]['every'] * i for i in range(len(means))]
    color, _ = _paint(group, name, bits, of)
    dashes = '--' if color == INK else '-'
    width = 1 if color == BLUE else 2
    # The students before training lose far more: they are left out.
    axes.plot(steps[1:], means[1:], dashes, color=color, linewidth=width)
    everything += means[1:]
  _scale(axes, 'y', everything)
  axes.set_xticks([0, *steps[1:]][::2])


def _marks(first: str) -> list[Line2D]:
  return [
    Line2D([], [], color=GREY, marker='|', linestyle='', label='one seed'),
    Line2D([], [], color=INK, marker='D', linestyle='--', label=first),
    Line2D([], [], color=BLUE, marker='o', label='mean of a variant'),
    Line2D(
      [],
      [],
      color=ORANGE,
      marker='s',
      label='mean of a variant; its best seed is worse than every black one',
    ),
  ]


def ablation(group: str) -> Figure:
  """Draws one group of ablations: its last step above, its course below."""
  config, names = results_studies.GROUPS[group]
  height = 0.24 * len(names) + 0.9
  figure = Figure(figsize=(11, height + 3), layout='constrained')
  ends, courses = figure.subplots(2, 4, height_ratios=[height, 2.2])
  for column, (bits, of, unit) in enumerate(_PANELS):
    _draw_ends(ends[column], group, bits, of)
    ends[column].set(title=f'{bits}, last step', xlabel=unit)
    if column:
      ends[column].tick_params(labelleft=False)
    _draw_courses(courses[column], group, bits, of)
    courses[column].set(
      title=f'{bits}, course', xlabel='student step', ylabel=unit
    )
  figure.legend(
    handles=_marks(next(iter(names.values()))),
    loc='outside lower left',
    ncols=4,
    frameon=False,
    fontsize=8.5,
  )
  figure.suptitle(
    f'{_TITLES[group]} ({_DATA[config]}, quarter-length runs)',
    x=0.01,
    ha='left',
    fontsize=12,
    fontweight='bold',
  )
  return figure


def shown(name: str) -> list[Record]:
  """Lists the records that a chart shows."""
  if name == 'drop_against_time':
    runs, targets = _time_records()
    return runs + targets
  return results_studies.ablated(name.removeprefix('ablation_'))


CHARTS: dict[str, Callable[[], Figure]] = {
  'drop_against_time': drop_against_time,
  **{
    f'ablation_{group}': functools.partial(ablation, group)
    for group in results_studies.GROUPS
  },
}


def draw(name: str, form: str = 'svg') -> bytes:
  """Draws a chart.

  Args:
    name: of the chart, a key of `CHARTS`.
    form: 'svg', or 'png' to look at it.

  Returns:
    The content of the file.
  """
  file = io.BytesIO()
  metadata: dict[str, Any] = {}
  if form == 'svg':
    digest = records.digest(shown(name))
    metadata = {'Date': None, 'Description': f'records sha256 {digest}'}
  with matplotlib.rc_context(STYLE):
    CHARTS[name]().savefig(file, format=form, metadata=metadata)
  # Matplotlib ends lines of paths with spaces.
  lines = file.getvalue()
  if form == 'svg':
    lines = b'\n'.join(line.rstrip() for line in lines.split(b'\n'))
  return lines
