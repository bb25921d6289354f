"""Tests that bad input ends with one clear line and exit code 2."""

import errno
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from clusterq_jax import weights
from clusterq_jax.config import validation
from clusterq_jax.config.meaning import Bounds
from clusterq_jax.runtime import metrics


def _refused(outcome, *expected):
  """Asserts that stderr holds exactly one line, which names the problem."""
  code, out, error = outcome
  assert code == 2, (out, error)
  assert error.startswith('error: '), error
  assert error.count('\n') == 1, error
  assert 'Traceback' not in out + error
  for part in expected:
    assert str(part) in error
  return error


@pytest.fixture
def run(command, tiny_config_file, tmp_path):
  """Returns a function that runs the tiny config with further flags."""

  def call(*flags):
    return command(
      f'--config={tiny_config_file}', f'--workdir={tmp_path / "run"}', *flags
    )

  return call


# --- Flags and config --------------------------------------------------------


def test_missing_workdir(command, tiny_config_file):
  _refused(command(f'--config={tiny_config_file}'), '--workdir')


def test_missing_config(command, tmp_path):
  _refused(command(f'--workdir={tmp_path}'), '--config')


def test_missing_config_file(command, tmp_path):
  missing = tmp_path / 'no.py'
  _refused(command(f'--config={missing}', f'--workdir={tmp_path}'), missing)


def test_config_file_that_raises(command, tmp_path):
  file = tmp_path / 'bad.py'
  file.write_text("def get_config():\n  raise RuntimeError('two\\nlines')\n")
  _refused(command(f'--config={file}', f'--workdir={tmp_path / "run"}'), 'two')


def test_stray_argument(run):
  _refused(run('config.seed=1'), "'config.seed=1'")


def test_unknown_mode(run):
  _refused(run('--mode=train'), 'mode', 'train')


@pytest.mark.parametrize(
  ('flag', 'expected'),
  [
    ('nonsense=1', ['nonsense']),
    ('student.nonsense=1', ['nonsense']),
    ('quant.weight_bits=1', ['quant.weight_bits=1', '2 to 8']),
    ('quant.activation_bits=9', ['quant.activation_bits=9', '2 to 8']),
    ('quant.placement=nowhere', ['nowhere', 'paper, integer']),
    ('teacher.arch=resnet9', ['resnet9', 'resnet20']),
    ('student.lr=fast', ['fast']),
    ('centroids.first_layer=7', ['first_layer=7', '0 to 6']),
    ('teacher.num_classes=10', ['4 classes', 'num_classes=10']),
  ],
)
def test_bad_field(run, tmp_path, flag, expected):
  _refused(run(f'--config.{flag}'), *expected)
  assert not (tmp_path / 'run').exists()


def test_a_misspelt_field(run):
  error = _refused(run('--config.schedule.batch_sise=8'), 'batch_sise')
  assert 'did you mean --config.schedule.batch_size?' in error
  assert "\\'" not in error


def test_help(command):
  code, out, error = command('--help')
  assert code == 0
  assert not error
  for said in (
    'quantize evaluate export report dryrun config --config --workdir --mode '
    '--distributed --num_processes'
  ).split():
    assert said in out
  assert out.count('clusterq --config=') >= 4  # usage and examples
  assert 'paper/resnet18' in out
  assert 'Folder of the run' in out
  assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
def test_one_machine_has_nothing_to_say_of_others(spawn, tmp_path):
  for mode, said in (('auto', False), ('on', True)):
    process = spawn(
      '-m',
      'clusterq_jax.main',
      '--config=configs/resnet18.py',
      f'--workdir={tmp_path}',
      f'--distributed={mode}',
      JAX_PLATFORMS='cpu',
    )
    _, error = process.communicate(timeout=120)
    assert ('distributed' in error) == said


def test_unknown_field_of_a_file(command, tiny_config_file, tmp_path):
  file = tmp_path / 'extra.py'
  file.write_text(
    tiny_config_file.read_text().replace(
      '  return config', '  config.unlock().extra = 1\n  return config'
    )
  )
  outcome = command(f'--config={file}', f'--workdir={tmp_path / "run"}')
  _refused(outcome, 'config.extra: unknown field')


def test_missing_weights(run, tmp_path):
  missing = tmp_path / 'no.safetensors'
  outcome = run(f'--config.teacher.weights={missing}')
  _refused(outcome, missing, 'akamaster')


def test_truncated_weights(run, tiny_teacher, tmp_path):
  file = tmp_path / 'cut.safetensors'
  file.write_bytes(tiny_teacher.read_bytes()[:5000])
  _refused(run(f'--config.teacher.weights={file}'), file, 'truncated')


def test_batch_that_does_not_divide(spawn, tiny_config_file, tmp_path):
  process = spawn(
    '-m',
    'clusterq_jax.main',
    f'--config={tiny_config_file}',
    f'--workdir={tmp_path / "run"}',
    '--config.schedule.batch_size=12',
    '--distributed=off',
    JAX_PLATFORMS='cpu',
    XLA_FLAGS='--xla_force_host_platform_device_count=8',
  )
  out, error = process.communicate(timeout=120)
  _refused(
    (process.returncode, out, error), 'batch_size=12', '8 devices', 'multiple'
  )
  assert not (tmp_path / 'run').exists()


# --- Workdir -----------------------------------------------------------------


def test_unwritable_workdir(command, tiny_config_file, tmp_path):
  file = tmp_path / 'file'  # permissions do not stop root; this does
  file.write_text('precious')
  outcome = command(f'--config={tiny_config_file}', f'--workdir={file}/run')
  _refused(outcome, f'{file}/run', 'cannot be written')
  outcome = command(f'--config={tiny_config_file}', f'--workdir={file}')
  _refused(outcome, file, 'cannot be written')
  assert file.read_text() == 'precious'


@pytest.mark.parametrize(
  ('workdir', 'expected'),
  [
    ('s3://bucket/run', 'gs://BUCKET/PATH'),
    ('gs://bucket/', 'gs://BUCKET/PATH'),
    ('gs://bucket/run', 'gcsfs'),
  ],
)
def test_workdir_elsewhere(
  command, tiny_config_file, monkeypatch, workdir, expected
):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)  # as if not installed
  loaded = importlib.import_module('fsspec.registry')._registry
  monkeypatch.delitem(loaded, 'gs', raising=False)
  outcome = command(f'--config={tiny_config_file}', f'--workdir={workdir}')
  _refused(outcome, workdir, expected)
  assert not os.path.exists(workdir.partition('/')[0])


def test_damaged_stored_config(run, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{')
  _refused(run(), 'config.json', 'not JSON')


@pytest.fixture
def small_disk(tmp_path):
  """Yields a folder on a file system with room for 1.5 checkpoints."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=1100k', 'tmpfs', str(folder)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as e:
    pytest.skip(f'a full disk cannot be made here: mounting a tmpfs: {e}')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def _remount(folder, options):
  command = ['mount', '-o', f'remount,{options}', str(folder)]
  subprocess.run(command, check=True)


@pytest.mark.slow
def test_full_disk(finished, command, tiny_config_file, small_disk, state_at):
  workdir = small_disk / 'run'
  flags = f'--config={tiny_config_file}', f'--workdir={workdir}'
  code, out, error = command(*flags)
  lines = [line for line in error.splitlines() if line.startswith('error: ')]
  assert code == 2
  assert len(lines) == 1
  assert 'cannot be written' in lines[0]
  assert os.strerror(28) in lines[0]
  assert 'Traceback' not in out + error
  # Complete files stay complete.
  failed = int(re.search(r'checkpoint (\d+) cannot', lines[0])[1])
  assert failed > 0
  assert state_at(failed - 2, workdir).step == failed - 2
  assert not (workdir / 'results.json').exists()
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    json.loads(line)

  _remount(small_disk, 'size=64m')
  code, _, error = command(*flags)
  assert code == 0, error
  assert f'resuming at step {failed - 2} of 10' in error
  for name in ('student.safetensors', 'metrics.jsonl'):
    assert (workdir / name).read_bytes() == (
      finished.workdir / name
    ).read_bytes(), name


def test_full_disk_for_a_line_of_metrics(small_disk):
  """A file system allocates whole pages, so the last line is incomplete."""
  path = small_disk / 'metrics.jsonl'
  log = metrics.MetricsFile(path, 0)
  (small_disk / 'full').write_bytes(bytes(1000 * 1024))

  def fill():
    for step in range(10_000):
      log.write(step, {'a': 0.123456})

  with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as error:
    fill()
  assert error.value.filename == str(path)
  lines = path.read_text().splitlines()
  assert 0 < len(lines) < 10_000
  assert [json.loads(line)['step'] for line in lines] == list(range(len(lines)))


def test_read_only_disk(command, tiny_config_file, small_disk):
  _remount(small_disk, 'ro')
  workdir = small_disk / 'run'
  outcome = command(f'--config={tiny_config_file}', f'--workdir={workdir}')
  _refused(outcome, workdir, os.strerror(errno.EROFS))


@pytest.mark.skipif(
  not pathlib.Path('/dev/full').exists(), reason='there is no /dev/full'
)
@pytest.mark.parametrize('name', ['config', 'results'])
def test_full_disk_for_small_files(finished, run, tmp_path, name):
  workdir = shutil.copytree(finished.workdir, tmp_path / 'run')
  before = (workdir / f'{name}.json').read_bytes()
  (workdir / f'{name}.json.{os.getpid()}.tmp').symlink_to('/dev/full')
  _images(tmp_path / 'a.npz')
  outcome = run(
    '--mode=evaluate',
    '--config.eval.source=npz',
    f'--config.eval.path={tmp_path / "a.npz"}',
    '--config.eval.network=teacher',
  )
  _refused(outcome, os.strerror(28))
  assert (workdir / f'{name}.json').read_bytes() == before


# --- Evaluation images -------------------------------------------------------


def _images(path, shape=(4, 8, 8, 3), dtype=np.uint8, labels=(0, 1, 2, 3)):
  np.savez(path, images=np.zeros(shape, dtype), labels=np.array(labels))


@pytest.mark.parametrize(
  ('arrays', 'expected'),
  [
    ({'shape': (4, 9, 8, 3)}, ['[9, 8, 3]', '[8, 8, 3]']),
    ({'shape': (4, 8, 8, 1)}, ['[8, 8, 1]', '[8, 8, 3]']),
    ({'dtype': np.float32}, ['float32', 'uint8']),
    ({'labels': (0, 1, 2, 4)}, ['0 to 4', '4 classes']),
    ({'labels': (-1, 1, 2, 3)}, ['-1 to 3']),
    ({'labels': (0.0, 1.0, 2.0, 3.0)}, ['float64', 'int']),
    ({'labels': (0, 1)}, ['4 images and 2 labels']),
  ],
)
@pytest.mark.parametrize('mode', ['quantize', 'evaluate'])
def test_evaluation_images(run, tmp_path, arrays, expected, mode):
  file = tmp_path / 'images.npz'
  _images(file, **arrays)
  outcome = run(
    f'--mode={mode}',
    '--config.eval.source=npz',
    f'--config.eval.path={file}',
  )
  _refused(outcome, file, *expected)
  assert not (tmp_path / 'run').exists()


def test_missing_evaluation_images(run, tmp_path):
  file = tmp_path / 'no.npz'
  outcome = run('--config.eval.source=npz', f'--config.eval.path={file}')
  _refused(outcome, file)


# --- NaN ---------------------------------------------------------------------


@pytest.mark.slow
def test_loss_that_is_no_longer_finite(
  finished, run, tmp_path, state_at, monkeypatch
):
  # No learning rate within the bounds makes such a small network diverge early.
  meaning = validation._MEANINGS['generator.lr']
  unbounded = meaning._replace(bounds=Bounds(0, 1e38))
  monkeypatch.setitem(validation._MEANINGS, 'generator.lr', unbounded)
  code, out, error = run('--config.generator.lr=1e30')
  lines = [line for line in error.splitlines() if line.startswith('error: ')]
  assert code == 2
  assert len(lines) == 1
  assert 'Traceback' not in out + error
  assert 'not finite from step 1 on;' in lines[0]
  workdir = tmp_path / 'run'
  assert str(workdir / 'checkpoints') in lines[0]
  names = {path.name for path in (workdir / 'checkpoints').iterdir()}
  assert names == {'0'}
  assert state_at(0, workdir).bad_step == -1
  assert not (workdir / 'student.safetensors').exists()
  # Finite lines before the failed step would stay, but there are none.
  assert (workdir / 'metrics.jsonl').read_text() == ''


def test_nan_in_weights(run, tiny_teacher, tmp_path):
  tensors, metadata = weights.read_tensors(tiny_teacher)
  tensors['params/stem/scale'][3] = np.nan
  file = tmp_path / 'nan.safetensors'
  weights.write_safetensors(file, weights.unflatten(tensors), metadata)
  _refused(run(f'--config.teacher.weights={file}'), file, 'stem/scale', 'NaN')
