"""Renders the page about one run, a single HTML file without links.

This module gathers the values; page.html.j2 holds the text. The page contains
figures 1 and 3 of the paper (arXiv 2205.00179): the teacher's features by
class, of synthetic and of real images. Figures show the first ten classes.
"""

import base64
import dataclasses
import datetime
import io
import json
import os
import pathlib
import platform
import re
from typing import Any, NamedTuple

import jax
import jinja2
import numpy as np
from PIL import Image

from clusterq_jax import config as config_lib
from clusterq_jax.config import Config
from clusterq_jax.deploy import export_files
from clusterq_jax.method.state import TrainState
from clusterq_jax.report import (
  closing_table,
  diagnostics,
  figures,
  quantities,
  quantization,
)
from clusterq_jax.runtime import bucket, samples
from clusterq_jax.runtime import workdir as workdir_lib
from clusterq_jax.runtime.session import Session
from clusterq_jax.weights.teacher import Teacher

MOST_CLASSES = len(figures.CLASSES)
_CLASSES_LISTED = 50  # rows of the table of drops by class
_COLUMNS = 8  # images of a class in the grid
_STRIP = 64  # largest height of an image in the grid, pixels
_NUMBER = re.compile(r'[-+]?\d+(\.\d+)?')
_Features = dict[str, dict[str, np.ndarray]]  # [N, C] by kind and layer


class Images(NamedTuple):
  """Images of the shown classes.

  Attributes:
    images: uint8 [N, H, W, C].
    labels: int [N].
  """

  images: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
  """Holds what the page shows.

  Attributes:
    session: session of the run.
    folder: workdir of the run.
    state: newest train state, or None without a checkpoint.
    results: content of results.json.
    lines: lines of metrics.jsonl.
    shown: classes in the figures, int [K], K at most MOST_CLASSES.
    images: images by kind, 'synthetic' before 'real'; either may be missing.
  """

  session: Session
  folder: pathlib.Path
  state: TrainState | None
  results: dict[str, Any]
  lines: list[dict[str, float]]
  shown: np.ndarray
  images: dict[str, Images]

  @property
  def config(self) -> Config:
    return self.session.config

  @property
  def teacher(self) -> Teacher:
    return self.session.teacher

  def class_name(self, label: int) -> str:
    names = self.teacher.class_names
    return names[label] if names else ''


def render(run: Run) -> str:
  """Returns the page as HTML.

  Args:
    run: what to show.
  """
  features, accuracy = {}, {}
  for kind, (images, labels) in run.images.items():
    features[kind], predicted = diagnostics.pooled_features(run.teacher, images)
    accuracy[kind] = 100 * np.mean(predicted == labels)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    # Names of classes and layers come from files of other people.
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.tests['numeric'] = lambda cell: bool(_NUMBER.fullmatch(cell))
  return environment.get_template('page.html.j2').render(
    run=run,
    name=run.folder.resolve().name,
    now=datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
    summary=closing_table.closing_rows(
      run.results, run.config, bucket.address(run.folder)
    ),
    config=json.dumps(config_lib.to_json(run.config), indent=2),
    drops=_drops(run),
    listed=_CLASSES_LISTED,
    metrics=_metrics(run),
    accuracy=accuracy,
    grid=_grid(run),
    colors=dict(zip(run.shown, figures.CLASSES, strict=False)),
    maps=_feature_maps(run, features),
    separation=_separation(run, features),
    quantization=None
    if 'unfinished' in run.results or 'synthetic' not in run.images
    else quantization.gather(
      run.folder, run.teacher, run.images['synthetic'].images
    ),
    export=_export(run),
  )


def _drops(run: Run) -> list[list[str]]:
  """Returns class, name, images and top-1 by class, largest drop first."""
  counts = run.results.get('by_class') or {'n': []}
  rows = []
  for k, n in enumerate(counts['n']):
    if n:
      before, after = (
        100 * counts[name][k] / n for name in ('teacher', 'student')
      )
      rows.append((before - after, k, n, before, after))
  rows.sort(key=lambda row: -row[0])
  return [
    [f'{k}', run.class_name(k), f'{n}']
    + [f'{value:.1f}' for value in (before, after, drop)]
    for drop, k, n, before, after in rows
  ]


def _metrics(run: Run) -> list[tuple[str, str, str]]:
  """Returns chart, key and meaning of each quantity of metrics.jsonl."""
  marks = [(phase.start, phase.name) for phase in run.session.phases[1:]]
  found = []
  for key in sorted({key for line in run.lines for key in line} - {'step'}):
    points = [(line['step'], line[key]) for line in run.lines if key in line]
    x, y = zip(*points, strict=True)
    title, unit, meaning = quantities.describe(key)
    scale = 100 if unit == quantities.SHARE else 1
    log = scale == 1 and min(y) > 0 and max(y) > 20 * min(y)
    chart = figures.curves(
      title,
      [figures.Curve('', x, [scale * value for value in y])],
      'training step',
      unit + ', log scale' * log,
      marks,
      log=log,
    )
    found.append((chart, key, meaning))
  return found


def _strip(images: np.ndarray) -> str:
  """Returns images [N, H, W, C] in a row of _COLUMNS, as a data URL."""
  blank = ((0, _COLUMNS - len(images)), (0, 0), (0, 0), (0, 0))
  row = np.pad(images, blank, constant_values=255)
  picture = Image.fromarray(samples.grid(row[None]))
  kind = 'PNG'
  if images.shape[1] > _STRIP:
    scale = _STRIP / images.shape[1]
    picture = picture.resize((round(picture.width * scale), _STRIP))
    kind = 'JPEG'  # a PNG of noise is large
  file = io.BytesIO()
  picture.save(file, kind)
  text = base64.b64encode(file.getvalue()).decode()
  return f'data:image/{kind.lower()};base64,{text}'


def _grid(run: Run) -> list[tuple[int, str, list[str]]]:
  """Returns each class, its name, and a strip or '' for each kind."""
  return [
    (
      k,
      run.class_name(k),
      [
        _strip(images[labels == k][:_COLUMNS]) if k in labels else ''
        for images, labels in run.images.values()
      ],
    )
    for k in run.shown
  ]


def _project(features: np.ndarray) -> np.ndarray:
  """Returns the first two principal components, [N, C] to [N, 2]."""
  centred = features - features.mean(0)
  left, scale, _ = np.linalg.svd(centred, full_matrices=False)
  return left[:, :2] * scale[:2]


def _feature_maps(run: Run, features: _Features) -> dict[str, list[str]]:
  """Returns charts of the teacher's features at four depths, by kind."""
  layers = run.teacher.graph.batch_norms
  depths = {
    layers[0]: 'First BatchNorm',
    layers[len(layers) // 2]: 'Middle BatchNorm',
    layers[-1]: 'Last BatchNorm',
    run.teacher.graph.weighted[-1]: 'Classifier input',
  }
  charts: dict[str, list[str]] = {kind: [] for kind in features}
  for layer, depth in depths.items() if features else ():
    # All kinds together, so that their maps have the same axes.
    points = _project(np.concatenate([f[layer] for f in features.values()]))
    low, high = points.min(0), points.max(0)
    for kind, found in features.items():
      mine, points = np.split(points, [len(found[layer])])
      labels = run.images[kind].labels
      title = f'{depth}, {kind}'
      charts[kind].append(figures.scatter(title, mine, labels, low, high))
  return charts


def _separation(run: Run, features: _Features) -> dict[str, list[str]]:
  """Returns charts of the distances between classes.

  Returns:
    `ratio`: the chart of the ratios by layer; empty without any ratio.
    `maps`: a heat map of the centroids' distances for each semantic layer;
      empty before the warm-up ends.
  """
  names = (*run.teacher.graph.batch_norms, run.teacher.graph.weighted[-1])
  places = range(1, len(names) + 1)
  lines, maps = [], []
  for kind, found in features.items():
    labels = run.images[kind].labels
    ratios = [
      diagnostics.separation_of_features(found[name], labels).ratio
      for name in names
    ]
    lines.append(figures.Curve(f'{kind} images', places, ratios))
  centroids = None if run.state is None else run.state.centroids
  seen = run.shown[:0]
  if centroids is not None:
    seen = run.shown[np.asarray(centroids.seen)[run.shown]]
  if centroids is not None and len(seen) > 1:
    first = run.session.steps.first_semantic_layer
    apart = [
      diagnostics.separation_of_centroids(layer, seen)
      for layer in jax.device_get(centroids.layers)
    ]
    semantic = places[first : first + len(apart)]
    ratios = [found.ratio for found in apart]
    lines.append(figures.Curve('centroids', semantic, ratios))
    largest = max(found.distances.max() for found in apart)
    maps = [
      figures.heat_map(
        f'BatchNorm {place}: {names[place - 1]}', found.distances, largest, seen
      )
      for place, found in zip(semantic, apart, strict=True)
    ]
  lines = [line for line in lines if np.isfinite(line.y).any()]
  chart = figures.curves(
    'Distance between classes, relative to the spread within a class',
    lines,
    'BatchNorm in forward order; the last point is the classifier input',
    'ratio',
    width=figures.WIDE,
  )
  return {'ratio': [chart] if lines else [], 'maps': maps}


def _export(run: Run) -> dict[str, Any]:
  """Returns what is known about the exported files.

  Returns:
    `folder`: where they are expected; `rows`: name, MB and ms of each file,
    none without an export; `timed`: whether they were timed; `machine`.
  """
  folder = workdir_lib.export_folder(run.config, str(run.folder))
  files = [folder / name for name in (export_files.FLOAT, export_files.INTEGER)]
  rows, timed = [], True
  if run.config.quant.placement == 'integer' and all(f.exists() for f in files):
    for file in files:
      seconds = diagnostics.latency(file)
      timed = timed and seconds is not None
      size = f'{file.stat().st_size / 1e6:.3f}'
      time = '' if seconds is None else f'{1e3 * seconds:.2f}'
      rows.append([file.name, size, time])
  machine = (
    f'{platform.machine()}, {os.cpu_count()} CPUs, load average '
    f'{os.getloadavg()[0]:.1f}'
  )
  return {
    'folder': bucket.address(folder),
    'rows': rows,
    'timed': timed,
    'machine': machine,
  }
