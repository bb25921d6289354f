"""--mode=report: a run in one HTML file, and its scalars for TensorBoard.

Figures 1 and 3 of the paper (arXiv 2205.00179) are here: features of the
teacher by class, of synthetic and of real images. The run is only read; what
it lacks so far is named in the place where it would stand. Nothing is drawn of
more than ten classes, the first ones.
"""

import base64
import dataclasses
import datetime
import html
import io
import math
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from clusterq_jax import (
  bucket,
  checkpoint,
  data,
  diagnostics,
  experiment,
  export,
  image_files,
  metrics,
  precision,
  report,
  samples,
  svg,
)
from clusterq_jax import config as config_lib
from clusterq_jax import student as student_lib
from clusterq_jax import workdir as workdir_lib
from clusterq_jax.errors import InputError
from clusterq_jax.state import TrainState
from clusterq_jax.steps import Steps
from clusterq_jax.teacher import Teacher

_CLASSES_LISTED = 50  # of the drop by class
_COLUMNS = 8  # images of a class in the grid
_STRIP = 64  # largest height of an image in the grid, pixels
_NUMBER = re.compile(r'[-+]?\d+(\.\d+)?')
_NO_STATE = 'There is no checkpoint, hence no generator to ask for images.'
_NO_IMAGES = 'There are no images to look at.'
# Of a batch of synthetic images: a generator's BatchNorm sees the whole batch,
# and must not see ten classes alone where it learned with a thousand.
_LEAST_SHARE = 0.25
# What each quantity of metrics.jsonl is, in one sentence.
_MEANINGS = {
  'generator/accuracy': 'Synthetic images that the teacher assigns to the '
  'class asked for.',
  'generator/diversity': 'Distance of class statistics to centroids with noise '
  '(eq. 6): keeps images of a class from becoming all alike.',
  'generator/inception': "Cross-entropy between the teacher's answer and the "
  'class asked for (eq. 8).',
  'generator/loss': 'What the generator minimises: the sum of its terms, '
  'weighted; after the warm-up it has class terms.',
  'generator/sfda': 'Distance of class statistics to the centroids of their '
  'class (eq. 4).',
  'generator/statistics': "Distance of the batch's statistics to those that "
  "the teacher's BatchNorms store (eq. 9).",
  'procedural/loss': 'The same distance for images that no generator makes, '
  'averaged over a batch.',
  'student/agreement': 'Images on which student and teacher give the same '
  'class.',
  'student/cross_entropy': "Cross-entropy between the student's answer and "
  'the class of the image (eq. 11).',
  'student/distillation': "Kullback-Leibler divergence of the student's "
  "answer from the teacher's (eq. 13).",
  'student/features': "Squared distance between the student's and the "
  "teacher's layer outputs, relative to the mean square of the latter.",
  'student/loss': 'What the student minimises: the sum of its terms, weighted.',
}

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1020px; margin: 24px auto; padding: 0 16px }
h1 { font-size: 24px; margin-bottom: 0 }
h2 { font-size: 19px; margin: 36px 0 4px; border-bottom: 1px solid #ccc }
h3 { font-size: 15px; margin: 14px 0 4px }
p { margin: 4px 0 10px; max-width: 80ch }
.missing { background: #fff6dd; padding: 6px 10px }
.charts { display: flex; flex-wrap: wrap; gap: 8px 12px }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: 2px 12px 2px 0; text-align: left; vertical-align: top }
td:first-child { white-space: nowrap }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.striped tr:nth-child(even) { background: #f4f6f8 }
.images td { vertical-align: middle; padding-bottom: 3px }
.images img { height: 46px; display: block; image-rendering: pixelated }
.key { display: inline-block; margin-right: 14px; white-space: nowrap }
.key b { display: inline-block; width: 11px; height: 11px; margin-right: 5px }
pre { font-size: 12px; background: #f4f6f8; padding: 8px; overflow: auto }
svg { max-width: 100%; height: auto }
figure { margin: 0; max-width: 324px }
figcaption { font-size: 12px; color: #555 }
"""


class _Images(NamedTuple):
  """Of the shown classes: uint8 [N, H, W, C], and labels, int [N]."""

  images: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Run:
  """What the parts of a report share.

  Attributes:
    config: the run's.
    folder: the workdir.
    teacher: as loaded.
    steps: of the run.
    state: its newest, or None.
    results: what results.json holds.
    lines: of metrics.jsonl.
    shown: the classes that are drawn.
    images: by kind, 'synthetic' and 'real', in this order; those there are.
  """

  config: ml_collections.ConfigDict
  folder: pathlib.Path
  teacher: Teacher
  steps: Steps
  state: TrainState | None
  results: dict[str, Any]
  lines: list[dict[str, float]]
  shown: np.ndarray
  images: dict[str, _Images]

  def class_name(self, label: int) -> str:
    names = self.teacher.class_names
    return names[label] if names else ''


@precision.in_float32
@bucket.on_copy
def write(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Writes report.html and event files into the workdir of a run.

  Args:
    config: the run's; `config.eval` names real images to set beside.
    workdir: of the run, finished or not.

  Returns:
    What results.json holds; `report`: whether there are `events`; and, unless
    the run is done, `unfinished`: how far it is.

  Raises:
    InputError: no run in the workdir, another config, unfit images, or more
      than one process.
  """
  config_lib.validate(config)
  if jax.process_count() > 1:
    raise InputError('--mode=report runs in one process: --distributed=off')
  if not (pathlib.Path(workdir) / 'config.json').exists():
    raise InputError(f'{workdir}: no run; expected config.json')
  teacher = experiment.load_teacher(config)
  real = experiment.load_images(config, teacher)
  steps = experiment.make_steps(config, teacher)
  shown = np.arange(min(teacher.num_classes, len(svg.CLASSES)))
  height, width, _ = teacher.preprocessing.shape
  per_class = 40 if height * width <= 64 * 64 else 8
  with workdir_lib.open_workdir(config, workdir) as folder:
    state, images = _newest_state(folder, steps, teacher), {}
    if state is not None:
      images['synthetic'] = _synthetic(
        steps, state, config.seed, shown, per_class
      )
    if real is not None:
      images |= _real(real, shown, per_class)
    lines = metrics.read(folder / 'metrics.jsonl')
    results = workdir_lib.read_results(folder)
    written = metrics.write_events(folder / 'tensorboard', lines, results)
    results['report'] = {'events': written}
    if 'steps' not in results:
      done = 0 if state is None else int(state.step)
      total = config_lib.total_steps(config.schedule)
      results['unfinished'] = f'step {done} of {total}'
    page = _page(
      _Run(config, folder, teacher, steps, state, results, lines, shown, images)
    )
    temporary = folder / 'report.tmp'
    temporary.write_text(page)
    temporary.replace(folder / 'report.html')
  return results


def _newest_state(
  folder: pathlib.Path, steps: Steps, teacher: Teacher
) -> TrainState | None:
  """None without a checkpoint."""
  checkpoints = bucket.address(folder / 'checkpoints')
  if not epath.Path(checkpoints).exists():
    return None
  abstract = steps.abstract_state(jax.random.key(0), teacher.variables)
  restored = checkpoint.Checkpoints(checkpoints).restore(abstract, print)
  return restored[0] if restored else None


def _synthetic(
  steps: Steps, state: TrainState, seed: int, shown: np.ndarray, per_class: int
) -> _Images:
  """New images of the newest generator, class after class in turn."""
  random = np.random.RandomState(seed)
  others = np.setdiff1d(np.arange(steps.num_classes), shown)
  share = max(len(shown) / steps.num_classes, _LEAST_SHARE)
  count = max(1, round(share * steps.batch_size))  # of a batch, that are kept
  wanted = np.tile(shown, per_class)
  generate = jax.jit(steps.generate)
  parts = []
  for i, start in enumerate(range(0, len(wanted), count)):
    labels = np.resize(wanted[start : start + count], count)
    if len(others):
      rest = random.choice(others, steps.batch_size - count)
      labels = np.concatenate([labels, rest])
    x, _ = generate(state.generator, jax.random.key(seed + i), labels)
    pixels = steps.preprocessing.to_pixels(jax.device_get(x[:count]))
    parts.append(np.asarray(pixels))
  return _Images(np.concatenate(parts)[: len(wanted)], wanted)


def _real(
  real: data.Images, shown: np.ndarray, per_class: int
) -> dict[str, _Images]:
  """The first images of each class, as 'real'; nothing if all are broken."""
  rows = np.concatenate(
    [np.flatnonzero(real.labels == k)[:per_class] for k in shown]
  )
  found = [real.images[row : row + 1] for row in rows]
  if isinstance(real.images, image_files.ImageFiles):
    readable = [row not in real.images.broken for row in rows]
    found = [image for image, good in zip(found, readable, strict=True) if good]
    rows = rows[readable]
  if not found:
    return {}
  return {'real': _Images(np.concatenate(found), real.labels[rows])}


# --- Sections ----------------------------------------------------------------


def _missing(reason: str) -> str:
  return f'<p class="missing">{html.escape(reason)}</p>'


def _charts(charts: Iterable[str]) -> str:
  return f'<div class="charts">{"".join(charts)}</div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Cells are text; those of numbers stand to the right."""

  def row(cells: Sequence[str], tag: str) -> str:
    return ''.join(
      f'<{tag}{number}>{html.escape(cell)}</{tag}>'
      for cell in cells
      for number in [' class="n"' * bool(_NUMBER.fullmatch(cell))]
    )

  lines = [row(header, 'th')] * bool(header) + [row(r, 'td') for r in rows]
  body = ''.join(f'<tr>{line}</tr>' for line in lines)
  return f'<table class="striped">{body}</table>'


def _summary(run: _Run) -> str:
  """What the run prints at its end."""
  text = _table(
    (), report.closing_rows(run.results, run.config, bucket.address(run.folder))
  )
  config = html.escape(config_lib.to_json(run.config))
  return (
    f'{text}<details><summary>Configuration</summary><pre>{config}</pre>'
    '</details>'
  )


def _curves(run: _Run) -> str:
  """A chart per quantity of metrics.jsonl."""
  if not run.lines:
    return _missing('metrics.jsonl holds no step yet.')
  marks, start = [], 0
  for name, length in config_lib.phases(run.config.schedule).items():
    if length and start:
      marks.append((start, name))
    start += length
  charts = []
  for key in sorted({key for line in run.lines for key in line} - {'step'}):
    points = [(line['step'], line[key]) for line in run.lines if key in line]
    x, y = zip(*points, strict=True)
    share = key.endswith(('accuracy', 'agreement'))
    log = not share and min(y) > 0 and max(y) > 20 * min(y)
    chart = svg.curves(
      key,
      [svg.Curve('', x, [100 * v for v in y] if share else y)],
      'step',
      ('% of a batch' if share else key.split('/')[-1]) + ', log scale' * log,
      marks,
      log=log,
    )
    meaning = html.escape(_MEANINGS.get(key, ''))
    charts.append(f'<figure>{chart}<figcaption>{meaning}</figcaption></figure>')
  return (
    '<p>Each point is one batch, as logged. A dashed line shows where a phase '
    f'begins.</p>{_charts(charts)}'
  )


def _by_class(run: _Run) -> str:
  """Top-1 of teacher and student class by class, largest drop first."""
  counts = run.results.get('by_class')
  if not counts:
    return _missing(
      'Labelled images show which classes lose most: --mode=evaluate '
      '--config.eval.source=npz --config.eval.path=FILE'
    )
  rows = []
  for k, n in enumerate(counts['n']):
    if n:
      before, after = (
        100 * counts[name][k] / n for name in ('teacher', 'student')
      )
      rows.append((before - after, k, n, before, after))
  rows.sort(key=lambda row: -row[0])
  cells = [
    [
      str(k),
      run.class_name(k),
      str(n),
      f'{before:.1f}',
      f'{after:.1f}',
      f'{drop:.1f}',
    ]
    for drop, k, n, before, after in rows[:_CLASSES_LISTED]
  ]
  left = len(rows) - len(cells)
  header = '#|class|images|teacher %|student %|drop, points'.split('|')
  return (
    '<p>Top-1 by class on the images of the latest evaluation, the classes '
    'that lose most first'
    + (f'; {left} more classes lose less' if left else '')
    + f'.</p>{_table(header, cells)}'
  )


def _strip(images: np.ndarray) -> str:
  """Images [N, H, W, C] side by side, as an <img>."""
  picture = Image.fromarray(samples.grid(images[None]))
  kind = 'PNG'
  if images.shape[1] > _STRIP:
    scale = _STRIP / images.shape[1]
    picture = picture.resize((round(picture.width * scale), _STRIP))
    kind = 'JPEG'  # a PNG of noise is large
  file = io.BytesIO()
  picture.save(file, kind)
  text = base64.b64encode(file.getvalue()).decode()
  return f'<img alt="" src="data:image/{kind.lower()};base64,{text}">'


def _grid(run: _Run) -> str:
  """Images by class, synthetic ones beside real ones."""
  kinds = ''.join(f'<th>{kind}</th>' for kind in run.images)
  rows = [f'<tr><th></th><th>class</th>{kinds}</tr>']
  for k in run.shown:
    strips = [
      _strip(of.images[of.labels == k][:_COLUMNS]) if k in of.labels else 'none'
      for of in run.images.values()
    ]
    cells = ''.join(f'<td>{strip}</td>' for strip in strips)
    name = html.escape(run.class_name(k))
    rows.append(f'<tr><td class="n">{k}</td><td>{name}</td>{cells}</tr>')
  return f'<table class="images">{"".join(rows)}</table>'


def _project(features: np.ndarray) -> np.ndarray:
  """The first two principal components, [N, C] to [N, 2]."""
  centred = features - features.mean(0)
  left, scale, _ = np.linalg.svd(centred, full_matrices=False)
  return left[:, :2] * scale[:2]


def _features(run: _Run, features: dict[str, dict[str, np.ndarray]]) -> str:
  """Maps of the teacher's features at four depths.

  Args:
    run: the run.
    features: pooled, by kind of image and layer.
  """
  layers = run.teacher.graph.batch_norms
  depths = {
    layers[0]: 'first BatchNorm',
    layers[len(layers) // 2]: 'middle BatchNorm',
    layers[-1]: 'last BatchNorm',
    run.teacher.graph.weighted[-1]: 'classifier input',
  }
  charts: dict[str, list[str]] = {kind: [] for kind in features}
  for layer, depth in depths.items():
    points = _project(np.concatenate([f[layer] for f in features.values()]))
    low, high = points.min(0), points.max(0)
    for kind, found in features.items():
      mine, points = np.split(points, [len(found[layer])])
      labels = run.images[kind].labels
      charts[kind].append(svg.scatter(depth, mine, labels, low, high))
  key = ''.join(
    f'<span class="key"><b style="background:{svg.CLASSES[k]}"></b>{k} '
    f'{html.escape(run.class_name(k))}</span>'
    for k in run.shown
  )
  return (
    '<p>Features of the teacher, averaged over space, at four depths: their '
    'first two principal components, of all images of a column together, so '
    'that its maps have the same axes. A number stands amid its class.</p>'
    f'<p>{key}</p>'
    + ''.join(
      f'<h3>{len(run.images[kind].labels)} {kind} images</h3>{_charts(c)}'
      for kind, c in charts.items()
    )
  )


def _classes_apart(
  run: _Run, features: dict[str, dict[str, np.ndarray]]
) -> str:
  """Between-class distance by layer, and the centroids' distances."""
  names = (*run.teacher.graph.batch_norms, run.teacher.graph.weighted[-1])
  places = range(1, len(names) + 1)
  curves, maps = [], []
  for kind, found in features.items():
    labels = run.images[kind].labels
    ratios = [
      diagnostics.separation_of_features(found[name], labels).ratio
      for name in names
    ]
    curves.append(svg.Curve(f'{kind} images', places, ratios))
  centroids = None if run.state is None else run.state.centroids
  seen = run.shown[:0]
  if centroids is not None:
    seen = run.shown[np.asarray(centroids.seen)[run.shown]]
  if centroids is not None and len(seen) > 1:
    first = run.steps.first_semantic_layer
    apart = [
      diagnostics.separation_of_centroids(layer, seen)
      for layer in jax.device_get(centroids.layers)
    ]
    semantic = places[first : first + len(apart)]
    curves.append(svg.Curve('centroids', semantic, [s.ratio for s in apart]))
    largest = max(s.distances.max() for s in apart)
    maps = [
      svg.heat_map(f'{place} {names[place - 1]}', s.distances, largest, seen)
      for place, s in zip(semantic, apart, strict=True)
    ]
  curves = [curve for curve in curves if np.isfinite(curve.y).any()]
  if not curves:
    return _missing('There are neither images nor centroids yet.')
  chart = svg.curves(
    'Distance between classes over spread within a class',
    curves,
    'BatchNorm, in forward order; the last one is the classifier input',
    'ratio',
    width=svg.WIDE,
  )
  return (
    '<p>Distances between the mean features of two classes, over the distances '
    'of images to the mean of their class, root mean square of both. Features '
    f'are averaged over space.</p>{_charts([chart])}'
    + (
      '<h3>Distances between class centroids</h3><p>Of the semantic layers, as '
      'in the checkpoint, in units of the spread within a class. Rows and '
      f'columns are classes.</p>{_charts(maps)}'
      if maps
      else _missing('The centroids begin with the end of the warm-up.')
    )
  )


def _errors(run: _Run) -> str:
  """Errors and use of ranges of the student, layer by layer."""
  if 'unfinished' in run.results:
    return _missing('The student is not finished.')
  if 'synthetic' not in run.images:
    return _missing(_NO_STATE)
  student = student_lib.load(run.folder)
  pictures = run.images['synthetic'].images
  # Fewer than in a forward pass: the outputs of all layers stay in memory.
  pictures = pictures[: max(8, diagnostics.batch_size(pictures.shape) // 4)]
  weights = diagnostics.weight_errors(run.teacher, student)
  outputs = diagnostics.output_errors(run.teacher, student, pictures)
  names = [n.name for n in run.teacher.graph.nodes]
  names = [name for name in names if name in weights or name in outputs]
  places = range(1, len(names) + 1)

  def curve(
    name: str, errors: dict[str, Any], field: str, scale=1
  ) -> svg.Curve:
    values = [
      scale * getattr(errors[n], field) if n in errors else math.nan
      for n in names
    ]
    return svg.Curve(name, places, values)

  x_label = 'layer, numbered as in the table'
  charts = [
    svg.curves(
      'Signal to quantization noise, higher is better',
      [
        curve('weights', weights, 'sqnr'),
        curve('outputs', outputs, 'sqnr'),
        curve('outputs, own rounding alone', outputs, 'rounding'),
      ],
      x_label,
      'dB',
      width=svg.WIDE,
    ),
    svg.curves(
      'Integer levels in use',
      [
        curve('weights', weights, 'levels', 100),
        curve('outputs', outputs, 'levels', 100),
      ],
      x_label,
      '% of levels',
    ),
    svg.curves(
      'Values outside of the range',
      [
        curve('weights', weights, 'clipped', 100),
        curve('outputs', outputs, 'clipped', 100),
      ],
      x_label,
      '% of values',
    ),
  ]

  def cells(error: Any, *fields: str) -> list[str]:
    """Bits, decibels, and shares in percent; blanks without a quantizer."""
    if error is None:
      return [''] * (len(fields) + 3)
    return [
      str(error.bits),
      *(f'{getattr(error, field):.1f}' for field in fields),
      f'{100 * error.levels:.1f}',
      f'{100 * error.clipped:.2f}',
    ]

  rows = [
    [
      str(place),
      name,
      *cells(weights.get(name), 'sqnr'),
      *cells(outputs.get(name), 'sqnr', 'rounding'),
    ]
    for place, name in zip(places, names, strict=True)
  ]
  header = '#|layer|weight bits|dB|levels %|clipped %'.split('|')
  header += 'output bits|dB|own dB|levels %|clipped %'.split('|')
  return (
    '<p>Against the teacher. Weights: the quantized kernels against the '
    "teacher's, so that what training changed counts as noise too; levels in "
    "use by output channel, on average; clipped: of the teacher's weights. "
    f'Outputs: on {len(pictures)} synthetic images; the noise of all layers '
    'before counts, but for the curve of its own rounding.</p>'
    f'{_charts(charts)}<details><summary>Table</summary>'
    f'{_table(header, rows)}</details>'
  )


def _export(run: _Run) -> str:
  """Size and latency of the exported files."""
  folder = export.folder_of(run.config, str(run.folder))
  files = [folder / name for name in (export.FLOAT, export.INTEGER)]
  placement = run.config.quant.placement
  if placement != 'integer':
    return _missing(
      f'A student of {placement} placement keeps residual adds in float, so '
      'that there is no integer file of it. Quantize again with '
      '--config.quant.placement=integer in another workdir, then --mode=export '
      'there; --config.generator.workdir of this run saves making the images '
      'again.'
    )
  if not all(file.exists() for file in files):
    return _missing(
      f'No {export.INTEGER} in {folder}: --mode=export writes it.'
    )
  times = [diagnostics.latency(file) for file in files]
  rows = [
    [
      file.name,
      f'{file.stat().st_size / 1e6:.3f}',
      '' if seconds is None else f'{1e3 * seconds:.2f}',
    ]
    for file, seconds in zip(files, times, strict=True)
  ]
  if None in times:
    how = 'Not timed: pip install onnxruntime.'
  else:
    how = (
      'Measured now on this machine, with whatever else it was doing: ONNX '
      'Runtime on one thread, one image a call, median of the calls of a '
      f'second each ({platform.machine()}, {os.cpu_count()} CPUs, load '
      f'{os.getloadavg()[0]:.1f}).'
    )
  return f'{_table(("file", "MB", "ms"), rows)}<p>{html.escape(how)}</p>'


# --- The page ----------------------------------------------------------------


def _page(run: _Run) -> str:
  """The whole file."""
  features, right = {}, []
  for kind, of in run.images.items():
    features[kind], answers = diagnostics.pooled_features(
      run.teacher, of.images
    )
    share = 100 * np.mean(answers == of.labels)
    right.append(f'{share:.1f} % of {len(of.labels)} {kind} images')
  notes = ''
  if run.state is None:
    notes += _missing(_NO_STATE)
  if 'real' not in run.images:
    notes += _missing(
      'No real images to set beside: --config.eval.source=npz '
      '--config.eval.path=FILE'
    )
  if run.teacher.num_classes > len(run.shown):
    notes += f'<p>The first {len(run.shown)} classes.</p>'
  if right:
    notes += f'<p>The teacher is right on {" and ".join(right)}.</p>'
  sections = {
    'Summary': _summary(run),
    'Drop by class': _by_class(run),
    'Curves': _curves(run),
    'Images': notes + (_grid(run) if features else ''),
    'Features': _features(run, features) if features else _missing(_NO_IMAGES),
    'Classes': _classes_apart(run, features),
    'Quantization': _errors(run),
    'Export': _export(run),
  }
  name = html.escape(run.folder.resolve().name)
  now = datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z')
  body = ''.join(
    f'<section id="{name}"><h2>{title}</h2>{text}</section>'
    for title, text in sections.items()
    for name in [title.lower().replace(' ', '-')]
  )
  return (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    f'<title>ClusterQ: {name}</title><style>{_STYLE}{svg.STYLE}</style>'
    '</head><body>'
    f'<h1>ClusterQ run {name}</h1>'
    f'<p>{html.escape(run.config.teacher.arch)}, {now}</p>{body}</body></html>'
  )
