"""Tests that a stopped or killed run resumes to bit-identical results."""

import json
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import clusterq_jax
from clusterq_jax.errors import InputError

# Results that depend on the clock or the process.
_MEASURED = (
  'wall_s',
  'compile_s',
  'compile_total_s',
  'images_per_s',
  'peak_rss_mb',
)


def _results(workdir):
  results = json.loads((workdir / 'results.json').read_text())
  return {k: v for k, v in results.items() if k not in _MEASURED}


def _assert_same_run(workdir, finished, state_at):
  for name in ('student.safetensors', 'metrics.jsonl', 'samples.png'):
    assert (workdir / name).read_bytes() == (
      finished.workdir / name
    ).read_bytes(), name
  states = state_at(10, workdir), state_at(10)
  assert states[0].step == 10
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.fixture
def workdir(finished, tmp_path):
  """Returns a copy of the finished run."""
  return shutil.copytree(finished.workdir, tmp_path / 'run')


# --- kill -9 -----------------------------------------------------------------


def _moments(workdir):
  """Returns the condition of each kill, by name."""
  checkpoints = workdir / 'checkpoints'

  def lines():
    file = workdir / 'metrics.jsonl'
    return file.read_text().count('\n') if file.exists() else 0

  return {
    'the first checkpoint is there': lambda: (checkpoints / '0').exists(),
    'the warm-up is done': lambda: (checkpoints / '2').exists(),
    'in the generator phase': lambda: lines() >= 4,
    'a checkpoint is being written': lambda: any(
      '.orbax-checkpoint-tmp' in path.name and path.name > '6'
      for path in checkpoints.iterdir()
    ),
    'the student is written': (workdir / 'student.safetensors').exists,
  }


def _kill_when(process, seen):
  """Sends SIGKILL once `seen()` is true; returns whether the run still ran."""
  end = time.monotonic() + 300
  while process.poll() is None and time.monotonic() < end:
    try:
      if seen():
        break
    except FileNotFoundError:
      pass  # the file was renamed in the meantime
    time.sleep(0.001)
  process.kill()
  process.communicate()
  return process.returncode == -9


@pytest.mark.slow
def test_killed_again_and_again(
  finished, state_at, spawn, tiny_config_file, tmp_path
):
  workdir = tmp_path / 'run'
  command = (
    '-m',
    'clusterq_jax.main',
    f'--config={tiny_config_file}',
    f'--workdir={workdir}',
  )
  for moment, seen in _moments(workdir).items():
    assert _kill_when(spawn(*command), seen), moment
    assert not (workdir / 'results.json').exists(), moment
  process = spawn(*command)
  out, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  assert 'resuming at step' in error
  assert 'agreement on synthetic images' in out
  _assert_same_run(workdir, finished, state_at)
  assert _results(workdir) == _results(finished.workdir)
  left = {path.name for path in (workdir / 'checkpoints').iterdir()}
  assert left == {'8', '10'}  # incomplete checkpoints are removed


# --- SIGTERM, and a second run ------------------------------------------------


@pytest.mark.slow
def test_sigterm_and_a_second_run(
  finished, state_at, spawn, command, tiny_config_file, tmp_path
):
  workdir = tmp_path / 'run'
  flags = f'--config={tiny_config_file}', f'--workdir={workdir}'
  process = spawn(
    '-m', 'clusterq_jax.main', *flags, '--config.report.trace_steps=1'
  )
  in_generator_phase = _moments(workdir)['in the generator phase']
  while process.poll() is None and not in_generator_phase():
    time.sleep(0.001)
  process.send_signal(signal.SIGSTOP)  # keeps it alive for the second run

  before = _contents(workdir)
  code, out, error = command(*flags)
  assert (code, out, error.count('\n')) == (2, '', 1)
  assert f'{workdir}: process {process.pid} on ' in error
  assert _contents(workdir) == before

  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGCONT)
  out, error = process.communicate(timeout=300)
  assert (process.returncode, out) == (0, ''), error
  said = error.splitlines()[-1]
  step = max(int(path.name) for path in (workdir / 'checkpoints').iterdir())
  assert 4 <= step < 10
  assert f'stopped by SIGTERM after step {step} of 10' in said
  assert 'the same command resumes from there' in said
  assert not (workdir / 'student.safetensors').exists()
  assert list((workdir / 'trace').rglob('*.xplane.pb'))  # of step 4

  code, _, error = command(*flags)
  assert code == 0, error
  assert f'resuming at step {step} of 10' in error
  _assert_same_run(workdir, finished, state_at)


# --- Checkpoints cut short ---------------------------------------------------


def _largest_file(folder: pathlib.Path) -> pathlib.Path:
  files = [path for path in folder.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped(
  finished, workdir, state_at, tiny_config, tmp_path, capfd
):
  """Truncates the newest checkpoint and adds an incomplete one."""
  newest = workdir / 'checkpoints' / '10'
  shutil.copytree(newest, newest.with_name('12.orbax-checkpoint-tmp'))
  victim = _largest_file(newest)
  victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
  for name in ('student.safetensors', 'results.json', 'samples.png'):
    (workdir / name).unlink()
  # The run evaluates on labels that the loaded student predicted.
  images = np.random.RandomState(1).randint(0, 256, (20, 8, 8, 3), np.uint8)
  student = clusterq_jax.load_student(finished.workdir)
  labels = np.array(student.logits(images)).argmax(-1)
  labels[:5] = (labels[:5] + 1) % 4
  np.savez(tmp_path / 'a.npz', images=images, labels=labels)
  tiny_config.eval.source = 'npz'
  tiny_config.eval.path = str(tmp_path / 'a.npz')

  capfd.readouterr()
  results = clusterq_jax.quantize(tiny_config, str(workdir))
  said = ' '.join(capfd.readouterr())
  assert 'checkpoint 10 cannot be read and is skipped' in said
  assert 'checkpoint 12' not in said
  assert 'resuming at step 8 of 10' in said
  _assert_same_run(workdir, finished, state_at)  # checkpoint 10 among it
  assert results['student']['top1'] == 75.0
  assert results['student']['n'] == 20
  assert results['synthetic'] == finished.results['synthetic']


def test_no_readable_checkpoint(workdir, tiny_config):
  for folder in (workdir / 'checkpoints').iterdir():
    _largest_file(folder).write_bytes(b'')
  before = (workdir / 'student.safetensors').read_bytes()
  with pytest.raises(InputError, match=r'none of the checkpoints \[8, 10\]'):
    clusterq_jax.quantize(tiny_config, str(workdir))
  assert (workdir / 'student.safetensors').read_bytes() == before


# --- Another config ----------------------------------------------------------


def _contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def test_another_config_is_refused(command, workdir, tiny_config_file):
  before = _contents(workdir)
  code, out, error = command(
    f'--config={tiny_config_file}',
    f'--workdir={workdir}',
    '--config.student.lr=0.5',
    '--config.schedule.student_steps=4',
    '--config.eval.batch_size=4',
  )
  assert code == 2
  assert out == ''
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert 'student.lr: 0.0001 -> 0.5' in error
  assert 'schedule.student_steps: 3 -> 4' in error
  assert 'eval' not in error
  assert _contents(workdir) == before
