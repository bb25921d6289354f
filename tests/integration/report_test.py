"""Tests --mode=report: the page about a run and the event files."""

import html.parser
import json
import shutil

import numpy as np
import pytest

from clusterq_jax import load_student
from clusterq_jax.modes import report as report_mode
from clusterq_jax.report import diagnostics, quantities
from clusterq_jax.runtime import metrics

_SECTIONS = (
  'summary drop-by-class curves images features classes quantization export'
).split()


class _Page(html.parser.HTMLParser):
  """Parser that collects sections, loaded files, identifiers and text."""

  def __init__(self, text):
    super().__init__()
    self.sections, self.loaded, self.identifiers = [], [], []
    self.text, self._open = '', []
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    if tag == 'section':
      self.sections.append(attributes['id'])
    self.loaded += [attributes[k] for k in ('src', 'href') if k in attributes]
    self.identifiers += [attributes['id']] if 'id' in attributes else []
    if tag not in ('meta', 'img'):
      self._open.append(tag)

  def handle_startendtag(self, tag, attributes):
    assert tag in ('path', 'rect', 'use', 'g'), tag  # in SVG alone

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if data.strip():
      self.text += ' '.join(data.split()) + '\n'


@pytest.fixture
def workdir(finished, tmp_path):
  """Returns a copy of the finished run."""
  return shutil.copytree(finished.workdir, tmp_path / 'run')


@pytest.fixture
def real(tmp_path):
  """Returns flags that name real images."""
  random = np.random.RandomState(0)
  path = tmp_path / 'real.npz'
  np.savez(
    path,
    images=random.randint(0, 256, (24, 8, 8, 3), np.uint8),
    labels=np.arange(24) % 3,  # none of the fourth class
  )
  return '--config.eval.source=npz', f'--config.eval.path={path}'


@pytest.mark.slow
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
  assert len(set(page.identifiers)) == len(page.identifiers)
  # The file is complete: it loads nothing except the images inside it.
  assert page.loaded
  assert all(url.startswith('data:image/png;base64,') for url in page.loaded)
  assert 'http' not in text
  assert '<script' not in text
  assert len(page.loaded) == 4 + 3  # a strip per class, real ones of three
  # The values are those of the run.
  results = json.loads(before)
  synthetic = results['synthetic']
  agreement = f'{synthetic["agreement"]:.2f} % ({synthetic["n"]} images)'
  assert agreement in page.text
  for name in 'ant', 'bee', 'generator/sfda', 'student/features':
    assert name in page.text
  # Every quantity has a description. The page explains the missing export.
  drawn = {
    key for line in metrics.read(workdir / 'metrics.jsonl') for key in line
  }
  assert drawn - {'step'} <= quantities.QUANTITIES.keys()
  meaning = quantities.describe('student/features').meaning
  assert f'student/features: {meaning}' in page.text
  assert '--config.quant.placement=integer\nin another workdir' in page.text
  student = load_student(workdir)
  errors = diagnostics.weight_errors(finished.teacher, student)
  for name, error in errors.items():
    assert f'\n{name}\n{error.bits}\n{error.sqnr:.1f}\n' in page.text


@pytest.mark.slow
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
  """Before the warm-up ends, the page tells what is missing."""
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
    'There is no checkpoint',
    'The student is not finished.',
    '--config.eval.source=npz',
  ):
    assert said in page.text
  assert not (workdir / 'results.json').exists()
  assert 'generator/loss' in page.text  # the page shows the existing metrics


def test_no_run(command, tiny_config_file, tmp_path):
  flags = f'--config={tiny_config_file}', f'--workdir={tmp_path}'
  code, _, error = command(*flags, '--mode=report')
  assert code == 2
  assert 'no run' in error
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('package', ['matplotlib', 'jinja2'])
def test_a_missing_package(
  command, tiny_config_file, workdir, monkeypatch, package
):
  def find_spec(name):
    return None if name == package else object()

  monkeypatch.setattr(report_mode.importlib.util, 'find_spec', find_spec)
  flags = f'--config={tiny_config_file}', f'--workdir={workdir}'
  code, _, error = command(*flags, '--mode=report')
  assert code == 2
  assert error.splitlines() == [
    f'error: --mode=report needs the package {package}: pip install '
    "'clusterq-jax[report]'"
  ]
  assert not (workdir / 'report.html').exists()
