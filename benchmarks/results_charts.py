"""Charts of the page of results, drawn by matplotlib from the records.

The files are the same on every call: no date, fixed names of their parts. Each
holds the digest of the records that it shows.
"""

import functools
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import ablation, records, results_rows
from benchmarks.records import Record
from benchmarks.results_tables import NETWORKS

# Okabe and Ito: colours that colour-blind readers can tell apart.
BLUE, ORANGE, GREY, INK = '#0072b2', '#d55e00', '#8a8f94', '#222222'
STYLE = {
  'axes.titlesize': 10,
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.grid.axis': 'x',
  'axes.axisbelow': True,
  'grid.color': '#e4e7ea',
  'font.size': 8.5,
  'ytick.major.size': 0,
  'svg.fonttype': 'none',
  'svg.hashsalt': 'clusterq-jax',
}


class Panel(NamedTuple):
  """One panel of a chart.

  Attributes:
    title: above it.
    unit: quantity and unit, below it.
    values: by row of the chart, of every seed.
    lines: positions of the dashed lines.
    limit: a row is orange if every seed is above it.
  """

  title: str
  unit: str
  values: Sequence[Sequence[float]]
  lines: Sequence[float]
  limit: float


def _draw(axes: Axes, panel: Panel) -> None:
  """Draws each seed and the mean of each row."""
  for line in panel.lines:
    axes.axvline(line, color=INK, linewidth=1, linestyle='--')
  every = [(v, i) for i, some in enumerate(panel.values) for v in some]
  axes.plot(*zip(*every, strict=True), '|', color=GREY, markersize=9)
  for color, marker, worse in ((BLUE, 'o', False), (ORANGE, 's', True)):
    means = [
      (statistics.mean(some), i)
      for i, some in enumerate(panel.values)
      if (min(some) > panel.limit) == worse
    ]
    if means:
      axes.plot(*zip(*means, strict=True), marker, color=color, markersize=6)
  axes.set(title=panel.title, xlabel=panel.unit)
  axes.set_ylim(len(panel.values) - 0.5, -0.5)
  numbers = [v for v, _ in every]
  if max(numbers) > 4 * min(numbers):
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
    axes.xaxis.set_minor_formatter(NullFormatter())


def dots(
  title: str,
  labels: Sequence[str],
  panels: Sequence[Panel],
  line: str,
  worse: str,
) -> Figure:
  """Draws a chart of rows with the same labels in every panel.

  Args:
    title: of the chart.
    labels: of the rows.
    panels: from left to right.
    line: what the dashed lines are.
    worse: what an orange mean is.

  Returns:
    The figure.
  """
  figure = Figure(figsize=(11, 0.26 * len(labels) + 1.5), layout='constrained')
  row = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, panel in zip(row, panels, strict=True):
    _draw(axes, panel)
    axes.set_yticks([])
  row[0].set_yticks(range(len(labels)), labels)
  marks = [
    ('one seed', GREY, '|', ''),
    ('mean', BLUE, 'o', ''),
    (worse, ORANGE, 's', ''),
    (line, INK, '', '--'),
  ]
  figure.legend(
    handles=[
      Line2D([], [], color=color, marker=marker, linestyle=style, label=text)
      for text, color, marker, style in marks
    ],
    loc='outside lower left',
    ncols=4,
    frameon=False,
  )
  figure.suptitle(title, x=0.01, ha='left', fontsize=12, fontweight='bold')
  return figure


def _ablation(title: str, group: str) -> tuple[Figure, list[Record]]:
  rows = results_rows.ablation(group)
  panels = []
  for bits in ablation.BITS:
    for of, unit in (('drop', 'drop, points'), ('divergence', 'KL, nats')):
      values = [row[f'{of}_{bits}'] for row in rows]
      line = statistics.mean(values[0])
      limit = max(values[0])
      panels.append(Panel(f'{bits}, last step', unit, values, [line], limit))
  labels = [row['label'] for row in rows]
  worse = 'mean; its best seed is worse than each seed of the first row'
  line = f'mean of: {labels[0]}'
  figure = dots(title, labels, panels, line, worse)
  return figure, [r for row in rows for r in row['records']]


def _drop_against_time() -> tuple[Figure, list[Record]]:
  """Draws each method's end, and where it first reached a published drop."""
  runs = records.read('time_to_accuracy')
  named = {'config': runs[0]['config'], 'bits': runs[0]['bits']}
  published = records.read('published', group='drop', **named)
  figure = Figure(figsize=(8.5, 4.4), layout='constrained')
  axes = figure.subplots()
  for paper in published:
    axes.axhline(paper['drop'], color=INK, linewidth=1, linestyle='--')
    text = f'{paper["method"]} {paper["drop"]:.2f} (quoted)'
    axes.text(15, paper['drop'] * 1.03, text, color=INK)
  for run in runs:
    color = BLUE if run['trained'] else ORANGE
    reached = [
      (run['reached_s'][paper['method']], paper['drop'])
      for paper in published
      if run['trained'] and paper['method'] in run['reached_s']
    ]
    path = [*reached, (run['end_s'], run['drop'])]
    axes.plot(*zip(*path, strict=True), '-', color=color, linewidth=1.2)
    for x, y in reached:
      axes.plot(x, y, 'o', color=color, markerfacecolor='white')
    axes.plot(*path[-1], 'o', color=color)
    place = {'xytext': (8, 0), 'textcoords': 'offset points', 'va': 'center'}
    text = f'{run["method"]}: {run["drop"]:.2f}'
    axes.annotate(text, path[-1], color=color, **place)
  legend = 'open: first evaluation at or below the quoted drop\nfilled: end'
  axes.text(0.99, 0.98, legend, transform=axes.transAxes, ha='right', va='top')
  axes.set(
    xlabel='wall time without compilation, s',
    ylabel='drop, points (log scale)',
    yscale='log',
    xlim=(0, 1.55 * max(run['end_s'] for run in runs)),
    title=f'CIFAR-10, ResNet-20, {named["bits"]}, two CPU cores, one seed',
  )
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
  axes.yaxis.set_minor_formatter(NullFormatter())
  return figure, runs + published


def _whole_commands() -> tuple[Figure, list[Record]]:
  """Draws drop against time of whole commands, one panel for each network."""
  rows = results_rows.whole_commands()
  networks = list(dict.fromkeys(row['config'] for row in rows))
  width = 4.4 * len(networks)
  figure = Figure(figsize=(width, 3.6), layout='constrained')
  shown: list[Record] = []
  for axes, config in zip(
    figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True
  ):
    own = [row for row in rows if row['config'] == config]
    bits = list(dict.fromkeys(row['bits'] for row in own))
    published = [
      paper
      for paper in records.read('published', group='drop')
      if paper['config'] == config and paper['bits'] in bits
    ]
    for paper in published:
      axes.axhline(paper['drop'], color=INK, linewidth=1, linestyle='--')
      text = f'{paper["method"]} {paper["drop"]:.2f} (quoted)'
      place = {'ha': 'right', 'va': 'bottom', 'color': INK}
      x_of_axes = axes.get_yaxis_transform()
      axes.text(0.99, paper['drop'], text, transform=x_of_axes, **place)
    for each, color in zip(bits, (BLUE, ORANGE)[: len(bits)], strict=True):
      line = [row for row in own if row['bits'] == each]
      for row in line:
        axes.plot(row['seconds'], row['drop'], '.', color=GREY)
      means = [(row['mean_seconds'], row['mean_drop']) for row in line]
      axes.plot(
        *zip(*means, strict=True), 'o-', color=color, linewidth=1.2, label=each
      )
      for row, at in zip(line, means, strict=True):
        place = {'xytext': (4, 5), 'textcoords': 'offset points'}
        axes.annotate(f'budget {row["fraction"]}', at, color=color, **place)
    axes.set(
      title=NETWORKS[config],
      xlabel='wall time of the whole command, nothing compiled before, s',
      ylabel='drop of the last step, points',
    )
    axes.set_xlim(0, 1.2 * max(max(row['seconds']) for row in own))
    lowest = min(min(row['drop']) for row in own)
    axes.set_ylim(bottom=min(0, 1.2 * lowest))
    axes.legend(frameon=False)
    shown += [r for row in own for r in row['records']] + published
  return figure, shown


_TITLES = {
  'class_terms': 'Class terms, CIFAR-10: variants differ as seeds do',
  'ideas': 'Ideas of the recipe, CIFAR-10, one left out at a time',
  'many_classes': 'Some of the same ideas, CIFAR-100',
}
CHARTS: dict[str, Callable[[], tuple[Figure, list[Record]]]] = {
  f'ablation_{group}': functools.partial(_ablation, title, group)
  for group, title in _TITLES.items()
} | {
  'drop_against_time': _drop_against_time,
  'whole_commands': _whole_commands,
}


def draw(name: str) -> bytes:
  """Draws a chart; returns the content of its SVG file."""
  file = io.BytesIO()
  with matplotlib.rc_context(STYLE):
    figure, shown = CHARTS[name]()
    text = f'records sha256 {records.digest(shown)}'
    metadata: dict[str, Any] = {'Date': None, 'Description': text}
    figure.savefig(file, format='svg', metadata=metadata)
  # Matplotlib ends lines of paths with spaces.
  return b'\n'.join(line.rstrip() for line in file.getvalue().split(b'\n'))
