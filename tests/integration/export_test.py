"""Tests --mode=export: its files, their use elsewhere, and refused input."""

import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import onnx
import pytest
from PIL import Image

from clusterq_jax import load_student
from clusterq_jax.modes import quantize

onnxruntime = pytest.importorskip('onnxruntime')
pytestmark = [pytest.mark.usefixtures('optimized'), pytest.mark.slow]

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_README = _ROOT / 'README.md'
_PAGE = _ROOT / 'docs' / 'deploy.md'
_EXAMPLES = re.findall(r'```python\n(.*?)```', _PAGE.read_text(), re.DOTALL)
_FILES = {
  'integer.onnx',
  'float32.onnx',
  'integer.stablehlo',
  'student.stablehlo',
  'selftest.py',
  'selftest.npz',
}
_OVERRIDES = (
  '--config.quant.placement=integer',
  '--config.schedule.warmup_steps=1',
  '--config.schedule.generator_steps=1',
  '--config.schedule.joint_steps=0',
  '--config.schedule.student_steps=1',
  '--config.schedule.pool_batches=1',
  '--config.schedule.procedural_batches=0',
)


@pytest.fixture(scope='module')
def exported(tiny_config_file, compile_cache, tmp_path_factory):
  """Returns a run of three steps and its export; tests must not change it."""
  del compile_cache
  config = runpy.run_path(str(tiny_config_file))['get_config']()
  for override in _OVERRIDES:
    field, value = override.removeprefix('--config.').split('=')
    section, name = field.split('.')
    config[section][name] = int(value) if value.isdigit() else value
  workdir = tmp_path_factory.mktemp('exported') / 'run'
  results = quantize.quantize(config, str(workdir))
  return types.SimpleNamespace(
    config=config, workdir=workdir, folder=workdir / 'export', results=results
  )


def _selftest(folder):
  return subprocess.run(
    [sys.executable, '-I', str(folder / 'selftest.py')],
    capture_output=True,
    text=True,
    check=False,
  )


def _pictures(n=30):
  random = np.random.RandomState(0)
  flat = random.randint(0, 256, (n, 1, 1, 3))
  noise = random.randint(0, 256, (n, 8, 8, 3))
  return np.uint8(noise // 3 + 2 * flat // 3)


# --- What it writes ----------------------------------------------------------


def test_files(exported):
  assert {f.name for f in exported.folder.iterdir()} == _FILES
  found = json.loads((exported.workdir / 'results.json').read_text())
  assert found == exported.results
  assert found['export'] == {
    'folder': str(exported.folder),
    'bytes': {f.name: f.stat().st_size for f in exported.folder.iterdir()},
  }
  # No temporary folder is left.
  assert not list(exported.workdir.glob('.export*'))


@pytest.mark.parametrize('name', ['integer.onnx', 'float32.onnx'])
def test_metadata(exported, name):
  model = onnx.load(exported.folder / name)
  onnx.checker.check_model(model, full_check=True)
  facts = {p.key: json.loads(p.value) for p in model.metadata_props}
  assert facts['class_names'] == ['ant', 'bee', 'cat', 'dog']
  assert facts['bits']['weights'] == 4
  assert facts['preprocessing']['std'] == [0.25, 0.22, 0.2]
  assert facts['config']['quant']['placement'] == 'integer'


def test_selftest_passes_here(exported):
  done = _selftest(exported.folder)
  assert done.returncode == 0, done.stdout + done.stderr
  assert 'this machine agrees' in done.stdout


def test_selftest_sees_other_logits(exported, tmp_path):
  for name in ('selftest.py', 'integer.onnx'):
    (tmp_path / name).write_bytes((exported.folder / name).read_bytes())
  with np.load(exported.folder / 'selftest.npz') as file:
    images, logits = file['images'], file['logits']
  logits[-1, 0] = np.nextafter(logits[-1, 0], np.float32(9))
  np.savez(tmp_path / 'selftest.npz', images=images, logits=logits)
  done = _selftest(tmp_path)
  assert done.returncode == 1
  assert 'logits of 1 of' in done.stdout


@pytest.mark.parametrize('name', ['selftest.npz', 'integer.onnx'])
def test_selftest_names_a_missing_file(exported, tmp_path, name):
  for other in {'selftest.py', 'selftest.npz', 'integer.onnx'} - {name}:
    (tmp_path / other).write_bytes((exported.folder / other).read_bytes())
  done = _selftest(tmp_path)
  assert done.returncode == 2
  assert f'error: {tmp_path / name}: no such file' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('name', ['integer', 'student'])
def test_stablehlo_runs_without_this_package(exported, name, tmp_path):
  np.save(tmp_path / 'images.npy', _pictures())
  script = f"""
import sys
import numpy as np
from jax import export
with open({str(exported.folder / f'{name}.stablehlo')!r}, 'rb') as file:
  program = export.deserialize(bytearray(file.read()))
np.save('logits.npy', program.call(np.load('images.npy')))
assert not any(name.startswith(('clusterq', 'flax')) for name in sys.modules)
"""
  subprocess.run([sys.executable, '-c', script], cwd=tmp_path, check=True)
  student = load_student(exported.workdir)
  network = student if name == 'student' else student.integer()
  expected = np.asarray(jax.jit(network.logits)(_pictures()))
  tolerance = 0 if name == 'integer' else 1e-4
  np.testing.assert_allclose(
    np.load(tmp_path / 'logits.npy'), expected, rtol=0, atol=tolerance
  )


def test_evaluate_says_what_the_runtime_does(
  exported, tiny_config_file, command, tmp_path
):
  images = _pictures()
  options = onnxruntime.SessionOptions()
  options.add_session_config_entry('session.x64quantprecision', '1')
  session = onnxruntime.InferenceSession(
    str(exported.folder / 'integer.onnx'), options
  )
  labels = session.run(None, {'images': images})[0].argmax(-1)
  student = np.asarray(load_student(exported.workdir).logits(images)).argmax(-1)
  labels[:3] = (labels[:3] + 1) % 4  # three of thirty wrong
  np.savez(tmp_path / 'a.npz', images=images, labels=labels)
  code, out, err = command(
    f'--config={tiny_config_file}',
    f'--workdir={exported.workdir}',
    '--mode=evaluate',
    *_OVERRIDES,
    '--config.eval.network=integer',
    '--config.eval.source=npz',
    f'--config.eval.path={tmp_path / "a.npz"}',
  )
  assert code == 0, err
  assert 'integer file top-1' in out
  results = json.loads((exported.workdir / 'results.json').read_text())
  labels[:3] = (labels[:3] + 3) % 4
  agreement = 100 * np.mean(labels == student)
  assert results['deployed']['top1'] == 90.0
  assert results['deployed']['n'] == 30
  assert results['deployed']['agreement'] == pytest.approx(agreement, abs=1e-3)


def test_the_example_of_the_readme(exported, tmp_path, monkeypatch, capsys):
  blocks = re.findall(r'```python\n(.*?)```', _README.read_text(), re.DOTALL)
  (example,) = (block for block in blocks if 'onnxruntime' in block)
  folder = tmp_path / 'runs' / 'mine' / 'export'
  folder.mkdir(parents=True)
  model = (exported.folder / 'integer.onnx').read_bytes()
  (folder / 'integer.onnx').write_bytes(model)
  picture = _pictures(1)[0]
  Image.fromarray(picture).save(tmp_path / 'picture.png')
  monkeypatch.chdir(tmp_path)
  exec(compile(example, 'README.md', 'exec'), {})
  logits = load_student(exported.workdir).integer().logits(picture[None])
  assert capsys.readouterr().out == f'class {int(np.argmax(logits))}\n'


@pytest.mark.parametrize('example', _EXAMPLES, ids=lambda text: text.split()[1])
def test_an_example_of_docs_deploy(exported, tmp_path, monkeypatch, example):
  workdir = tmp_path / 'runs' / 'mine'
  shutil.copytree(exported.workdir, workdir)
  Image.fromarray(_pictures(1)[0]).save(tmp_path / 'picture.png')
  monkeypatch.chdir(tmp_path)
  names: dict = {}
  exec(compile(example, _PAGE.name, 'exec'), names)
  if 'logits' in names:
    assert np.shape(names['logits'])[-1] == 4


# --- What it refuses ---------------------------------------------------------


def _refused(command, config_file, workdir, expected, *flags):
  code, _, err = command(
    f'--config={config_file}', f'--workdir={workdir}', '--mode=export', *flags
  )
  assert code == 2
  assert expected in err
  assert len(err.strip().splitlines()) == 1


def test_paper_placement(finished, tiny_config_file, command):
  _refused(
    command,
    tiny_config_file,
    finished.workdir,
    "expected 'integer': quantize again with --config.quant.placement=integer",
  )


def test_no_finished_run(tiny_config_file, command, tmp_path):
  workdir = tmp_path / 'nothing'
  _refused(command, tiny_config_file, workdir, 'no finished student')
  assert not workdir.exists()


def test_existing_folder(exported, tiny_config_file, command):
  before = (exported.folder / 'integer.onnx').stat().st_mtime_ns
  _refused(
    command, tiny_config_file, exported.workdir, 'export exists', *_OVERRIDES
  )
  assert (exported.folder / 'integer.onnx').stat().st_mtime_ns == before


def test_another_folder(exported, tiny_config_file, command, tmp_path):
  code, out, err = command(
    f'--config={tiny_config_file}',
    f'--workdir={exported.workdir}',
    '--mode=export',
    *_OVERRIDES,
    f'--config.export.folder={tmp_path / "deep" / "er"}',
  )
  assert code == 0, err
  assert {f.name for f in (tmp_path / 'deep' / 'er').iterdir()} == _FILES
  assert 'integer.onnx' in out


def test_a_run_exports_again_and_can_be_told_not_to(
  exported, tmp_path, monkeypatch
):
  config = exported.config.copy_and_resolve_references()
  workdir = shutil.copytree(exported.workdir, tmp_path / 'run')
  before = (workdir / 'export' / 'integer.onnx').read_bytes()
  (workdir / 'export' / 'integer.onnx').write_bytes(b'damaged')
  # The run is finished, so the same command only writes its results again.
  quantize.quantize(config, str(workdir))
  assert (workdir / 'export' / 'integer.onnx').read_bytes() == before
  shutil.rmtree(workdir / 'export')
  config.export.after_training = False
  quantize.quantize(config, str(workdir))
  assert not (workdir / 'export').exists()
