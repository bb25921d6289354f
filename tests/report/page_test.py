"""The page: names stay text, and every section tells what it lacks."""

import base64
import dataclasses
import html.parser
import io
import types

import numpy as np
import pytest
from PIL import Image

from clusterq_jax import config as config_lib
from clusterq_jax.method import phases
from clusterq_jax.report import diagnostics, page

_HOSTILE = '</td></svg><script src="x">alert(1)</script>&amp;'
_LAYERS = ('stem', _HOSTILE)


class _Page(html.parser.HTMLParser):
  """Notes tags and text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text = [], ''
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)

  def handle_data(self, data):
    if data.strip():
      self.text += ' '.join(data.split()) + '\n'


@pytest.fixture
def make_run(monkeypatch, tmp_path):
  """Makes a run of two classes; features need no network."""

  def pooled_features(teacher, images):
    random = np.random.RandomState(len(images))
    names = (*_LAYERS, 'classifier')
    features = {name: random.randn(len(images), 3) for name in names}
    return features, np.zeros(len(images), int)

  def make(**fields):
    graph = types.SimpleNamespace(
      batch_norms=_LAYERS, weighted=(*_LAYERS, 'classifier'), nodes=()
    )
    teacher = types.SimpleNamespace(
      graph=graph, class_names=['ant', _HOSTILE], num_classes=2
    )
    config = config_lib.resolve(config_lib.default_config())
    changed = dataclasses.replace(config.teacher, arch=_HOSTILE)
    config = dataclasses.replace(config, teacher=changed)
    session = types.SimpleNamespace(
      config=config,
      teacher=teacher,
      phases=phases.phases(config.schedule),
      steps=types.SimpleNamespace(first_semantic_layer=1),
    )
    run = {
      'session': session,
      'folder': tmp_path,
      'state': None,
      'results': {},
      'lines': [],
      'shown': np.arange(2),
      'images': {},
    }
    return page.Run(**{**run, **fields})

  monkeypatch.setattr(diagnostics, 'pooled_features', pooled_features)
  return make


def _images(count):
  return page.Images(np.zeros((count, 4, 4, 3), np.uint8), np.arange(count) % 2)


def _state(classes=2):
  """A state with centroids at one semantic layer, whose name is hostile."""
  layer = types.SimpleNamespace(
    mean=np.eye(classes), square=2 * np.eye(classes)
  )
  centroids = types.SimpleNamespace(
    layers=(layer,), seen=np.ones(classes, bool)
  )
  return types.SimpleNamespace(centroids=centroids)


def test_names_from_files_never_become_markup(make_run, tmp_path):
  folder = tmp_path / '<script>'
  folder.mkdir()
  run = make_run(
    folder=folder,
    state=_state(),
    results={
      'images': {'source': 'npz', 'path': _HOSTILE, 'n': 8},
      'by_class': {'n': [4, 4], 'teacher': [4, 3], 'student': [4, 1]},
      'unfinished': 'step 1 of 2',
    },
    lines=[{'step': 1, _HOSTILE: 1.0}, {'step': 2, _HOSTILE: 2.0}],
    images={'synthetic': _images(8), 'real': _images(6)},
  )
  found = _Page(page.render(run))
  assert 'script' not in found.tags
  assert found.tags.count('svg') == 1 + 6 + 1 + 1
  lines = found.text.splitlines()
  assert 'ClusterQ run <script>' in lines
  # The table of drops, the chart's title and its y axis, its caption, the grid
  # of images: everywhere the whole name.
  assert lines.count(_HOSTILE) == 5
  assert f'1 {_HOSTILE}' in lines  # the key of the features
  assert f'BatchNorm 2: {_HOSTILE}' in lines
  assert any(f'Network {_HOSTILE};' in line for line in lines)


def test_an_empty_run_tells_what_it_lacks(make_run):
  found = _Page(page.render(make_run(results={'unfinished': 'step 0 of 2'})))
  assert found.tags.count('section') == 8
  assert 'svg' not in found.tags
  for text in (
    'No labelled images were evaluated yet.',
    'metrics.jsonl contains no steps yet.',
    'There is no checkpoint',
    'There are no real images for comparison.',
    'There are no images to compute features from.',
    'There are neither images nor centroids yet.',
    'The student is not finished.',
    'There are no exported files',
  ):
    assert text in found.text.replace('\n', ' ')


def test_centroids_begin_after_the_warm_up(make_run):
  state = _state()
  state.centroids.seen[1] = False
  run = make_run(state=state, images={'synthetic': _images(8)})
  run.results['unfinished'] = 'step 1 of 2'
  text = _Page(page.render(run)).text
  assert 'There are no centroids before the warm-up ends.' in text
  assert (
    'The teacher classifies 50.0 % of 8 synthetic images correctly.' in text
  )


def test_the_first_classes_are_shown(make_run):
  run = make_run(shown=np.arange(1), results={'unfinished': ''})
  text = _Page(page.render(run)).text
  assert 'The figures show the first 1 of 2 classes.' in text


def test_drops(make_run, monkeypatch):
  counts = {'n': [8, 8], 'teacher': [8, 8], 'student': [7, 2]}
  run = make_run(results={'by_class': counts, 'unfinished': ''})
  assert page._drops(run) == [
    ['1', _HOSTILE, '8', '100.0', '25.0', '75.0'],
    ['0', 'ant', '8', '100.0', '87.5', '12.5'],
  ]
  assert 'The table lists' not in page.render(run)
  monkeypatch.setattr(page, '_CLASSES_LISTED', 1)
  text = _Page(page.render(run)).text
  assert 'The table lists 1 of 2 classes.' in text
  assert 'ant' not in text.splitlines()
  # No image of a class: no drop of it.
  counts['n'][1] = 0
  assert [row[0] for row in page._drops(run)] == ['0']


def test_shares_are_percent_and_wide_ranges_logarithmic(make_run):
  key = 'student/agreement'
  lines = [
    {'step': i, key: i / 4, 'student/loss': 10.0**-i} for i in range(1, 4)
  ]
  charts = {
    name: chart for chart, name, _ in page._metrics(make_run(lines=lines))
  }
  texts = _Page(charts[key]).text.splitlines()
  assert {'Student: agreement', '% of the batch', '50'} <= set(texts)
  texts = _Page(charts['student/loss']).text.splitlines()
  assert {'weighted sum, log scale', '0.01'} <= set(texts)


def test_a_short_strip_is_as_wide_as_the_others():
  def size(count, side):
    images = np.zeros((count, side, side, 1), np.uint8)
    kind, _, text = page._strip(images).partition(';base64,')
    return kind, Image.open(io.BytesIO(base64.b64decode(text))).size

  assert size(3, 8) == size(8, 8) == ('data:image/png', (71, 8))
  kind, (_, height) = size(8, 100)
  assert (kind, height) == ('data:image/jpeg', 64)


def test_project():
  random = np.random.RandomState(0)
  plane = random.randn(50, 2) * [5, 1]
  points = page._project(np.pad(plane, ((0, 0), (0, 4))) + 7)
  # A rotation of the plane: distances stay.
  centred = plane - plane.mean(0)
  np.testing.assert_allclose(points @ points.T, centred @ centred.T, atol=1e-9)
  assert points[:, 0].var() > points[:, 1].var()


@pytest.mark.parametrize('timed', [True, False])
def test_export(make_run, monkeypatch, tmp_path, timed):
  run = make_run(results={'unfinished': ''})
  text = _Page(page.render(run)).text
  assert f'There are no exported files in {tmp_path}/export.' in text
  (tmp_path / 'export').mkdir()
  for name in 'float32.onnx', 'integer.onnx':
    (tmp_path / 'export' / name).write_bytes(bytes(250_000))
  seconds = 0.0125 if timed else None
  monkeypatch.setattr(diagnostics, 'latency', lambda _: seconds)
  text = _Page(page.render(run)).text
  assert 'integer.onnx\n0.250\n' + timed * '12.50\n' in text
  assert ('Latency is the median' in text) == timed
  assert ('pip install onnxruntime' in text) != timed
