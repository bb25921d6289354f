"""--mode=report: one file that holds what the run holds, and event files."""

import html.parser
import json
import shutil
import struct

import numpy as np
import pytest

from clusterq_jax import load_student
from clusterq_jax.layers import float_layers
from clusterq_jax.report import diagnostics
from clusterq_jax.report import page as html_report
from clusterq_jax.runtime import metrics

_SECTIONS = (
  'summary drop-by-class curves images features classes quantization export'
).split()


class _Page(html.parser.HTMLParser):
  """Notes sections, what is loaded, and text; tags must be closed."""

  def __init__(self, text):
    super().__init__()
    self.sections, self.loaded, self.text, self._open = [], [], '', []
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    if tag == 'section':
      self.sections.append(attributes['id'])
    self.loaded += [attributes[k] for k in ('src', 'href') if k in attributes]
    if tag not in ('meta', 'img'):
      self._open.append(tag)

  def handle_startendtag(self, tag, attributes):
    pass

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text += f'{data}\n'


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of the finished run."""
  return shutil.copytree(finished.workdir, tmp_path / 'run')


@pytest.fixture
def real(tmp_path):
  """Flags that name real images, whose path."""
  random = np.random.RandomState(0)
  path = tmp_path / 'real.npz'
  np.savez(
    path,
    images=random.randint(0, 256, (24, 8, 8, 3), np.uint8),
    labels=np.arange(24) % 3,  # none of the fourth class
  )
  return '--config.eval.source=npz', f'--config.eval.path={path}'


def test_report(command, finished, tiny_config_file, workdir, real):
  before = (workdir / 'results.json').read_text()
  flags = f'--config={tiny_config_file}', f'--workdir={workdir}', *real
  code, out, error = command(*flags, '--mode=report')
  assert code == 0, error
  assert f'{workdir}/report.html' in out
  assert (workdir / 'results.json').read_text() == before
  text = (workdir / 'report.html').read_text()
  page = _Page(text)
  assert page.sections == _SECTIONS
  # Self-contained: nothing but images within.
  assert page.loaded
  assert all(url.startswith('data:image/png;base64,') for url in page.loaded)
  assert 'http' not in text
  assert '<script' not in text
  assert len(page.loaded) == 4 + 3  # a strip per class, real ones of three
  # The figures are those of the run.
  results = json.loads(before)
  synthetic = results['synthetic']
  agreement = f'{synthetic["agreement"]:.2f} % ({synthetic["n"]} images)'
  assert agreement in page.text
  for name in 'ant', 'bee', 'generator/sfda', 'student/features':
    assert name in page.text
  # A sentence for each quantity; what `paper` placement means for the export.
  drawn = {
    key for line in metrics.read(workdir / 'metrics.jsonl') for key in line
  }
  assert drawn - {'step'} <= html_report._MEANINGS.keys()
  assert 'layer outputs, relative to the mean square' in page.text
  assert '--config.quant.placement=integer in another workdir' in page.text
  student = load_student(workdir)
  errors = diagnostics.weight_errors(finished.teacher, student)
  for name, error in errors.items():
    assert f'\n{name}\n{error.bits}\n{error.sqnr:.1f}\n' in page.text


def test_drop_by_class(command, tiny_config_file, workdir, real):
  flags = f'--config={tiny_config_file}', f'--workdir={workdir}', *real
  assert command(*flags, '--mode=evaluate')[0] == 0
  assert command(*flags, '--mode=report')[0] == 0
  counts = json.loads((workdir / 'results.json').read_text())['by_class']
  page = _Page((workdir / 'report.html').read_text())
  assert counts['n'] == [8, 8, 8]
  for k, name in enumerate(('ant', 'bee', 'cat')):
    before, after = (counts[who][k] / 8 * 100 for who in ('teacher', 'student'))
    row = f'{k}\n{name}\n8\n{before:.1f}\n{after:.1f}\n{before - after:.1f}\n'
    assert row in page.text


def test_unfinished(command, tiny_config_file, workdir):
  """Before the end of the warm-up: what is missing is said."""
  for name in ('results.json', 'student.safetensors'):
    (workdir / name).unlink()
  shutil.rmtree(workdir / 'checkpoints')
  flags = f'--config={tiny_config_file}', f'--workdir={workdir}'
  code, out, error = command(*flags, '--mode=report')
  assert code == 0, error
  assert 'not finished' in out
  page = _Page((workdir / 'report.html').read_text())
  assert page.sections == _SECTIONS
  for said in (
    'step 0 of 10',
    html_report._NO_STATE,
    'The student is not finished.',
    '--config.eval.source=npz',
  ):
    assert said in page.text
  assert not (workdir / 'results.json').exists()
  assert 'generator/loss' in page.text  # what there is, is shown


def test_no_run(command, tiny_config_file, tmp_path):
  flags = f'--config={tiny_config_file}', f'--workdir={tmp_path}'
  code, _, error = command(*flags, '--mode=report')
  assert code == 2
  assert 'no run' in error
  assert not list(tmp_path.iterdir())


def test_events(finished, tmp_path):
  pytest.importorskip('tensorboardX')
  from tensorboardX.proto import event_pb2

  lines = metrics.read(finished.workdir / 'metrics.jsonl')
  folder = tmp_path / 'tensorboard'
  for _ in range(2):  # the second time in place of the first
    assert metrics.write_events(folder, lines, finished.results)
  (file,) = folder.iterdir()
  records, found = file.read_bytes(), {}
  while records:  # length, its checksum, event, its checksum
    (length,) = struct.unpack('<Q', records[:8])
    event = event_pb2.Event.FromString(records[12 : 12 + length])
    records = records[16 + length :]
    for value in event.summary.value:
      found[event.step, value.tag] = value.simple_value
  expected = {
    (line['step'], tag): value
    for line in lines
    for tag, value in line.items()
    if tag != 'step'
  }
  agreement = finished.results['synthetic']['agreement']
  expected[10, 'results/synthetic/agreement'] = agreement
  assert found == pytest.approx(expected)


# --- The numbers -------------------------------------------------------------


def test_pooled_features(finished):
  teacher = finished.teacher
  images = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3), np.uint8)
  features, answers = diagnostics.pooled_features(teacher, images)
  assert list(features) == [*teacher.graph.batch_norms, 'classifier']
  classifier = teacher.variables['params']['classifier']
  logits = features['classifier'] @ classifier['kernel'] + classifier['bias']
  network = teacher.build(float_layers.layer_set())
  expected = network.apply(
    teacher.variables, teacher.preprocessing.normalize(images)
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(answers, np.argmax(expected, -1))


def test_separation():
  random = np.random.RandomState(0)
  labels = np.repeat([0, 1], 4000)
  # Two classes 3 apart, of unit variance in each of 4 dimensions: spread 2.
  features = random.randn(8000, 4) + 3 * np.eye(4)[0] * labels[:, None]
  found = diagnostics.separation_of_features(features, labels)
  assert found.ratio == pytest.approx(1.5, rel=0.03)
  assert found.distances[0, 1] == pytest.approx(1.5, rel=0.03)
  # Few images of one and the same distribution: no distance that is noise.
  ratios = [
    diagnostics.separation_of_features(random.randn(40, 4), labels[::200]).ratio
    for _ in range(200)
  ]
  assert np.mean(np.square(ratios)) < 0.05
  one = diagnostics.separation_of_features(features[:9], labels[:9])
  assert np.isnan(one.ratio)


def test_errors(finished):
  teacher, student = finished.teacher, load_student(finished.workdir)
  weights = diagnostics.weight_errors(teacher, student)
  assert list(weights) == list(teacher.graph.weighted)
  images = np.random.RandomState(0).randint(0, 256, (8, 8, 8, 3), np.uint8)
  outputs = diagnostics.output_errors(teacher, student, images)
  assert list(outputs) == [name for name, _ in student.plan.outputs]
  # The first quantizer, by hand: 8 bits, over the whole range of pixels.
  x = np.asarray(teacher.preprocessing.normalize(images))
  step = student.preprocessing.limit / 127
  codes = np.clip(np.round(x / step), -128, 127)
  noise = np.mean((x - step * codes) ** 2)
  first = outputs['input']
  expected = 10 * np.log10(np.mean(x**2) / noise)
  assert first.rounding == pytest.approx(expected, abs=0.01)
  assert first.sqnr == first.rounding
  assert first.levels == len(np.unique(codes)) / 256
  assert first.clipped == 0
  for error in outputs.values():
    assert 0 < error.levels <= 1
    assert 0 <= error.clipped < 1
