"""Tests the line that a run prints before its first step."""

import re

import jax
import pytest

from clusterq_jax import config as config_lib
from clusterq_jax.runtime import estimate, roofline
from clusterq_jax.runtime.session import Session


def _said(finished, capfd):
  capfd.readouterr()
  estimate.announce(finished.session, 0)
  out, error = capfd.readouterr()
  assert out == ''
  return error.splitlines()


def test_one_line(finished, capfd):
  (line,) = _said(finished, capfd)
  assert re.fullmatch(
    r'estimate: about \d+ (s|min) from here, \d+\.\d GB of memory, '
    r'\d+ MB of disk',
    line,
  )


@pytest.mark.parametrize(('processes', 'steps'), [(1, 1), (2, 2)])
def test_processes_do_not_decide_by_their_own_clocks(
  finished, monkeypatch, processes, steps
):
  """A slow step is measured once, but not in one of several processes."""
  session, found = Session(finished.session.config, finished.teacher), []
  program = finished.programs['generator_step']

  def step(*args):
    found.append(1)
    return program(*args)

  monkeypatch.setattr(session, 'program', lambda _: step)
  monkeypatch.setattr(session, 'prepare', lambda *_, **__: None)
  monkeypatch.setattr(estimate, '_SLOW_S', 0.0)
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  estimate._seconds(session, 0)
  assert len(found) == steps


def test_memory_that_does_not_fit(finished, capfd, monkeypatch):
  monkeypatch.setattr(estimate, '_available', lambda: int(2e8))
  warning, line = _said(finished, capfd)
  assert warning.startswith('warning: the run needs about ')
  assert '200 MB are available' in warning
  assert 'config.schedule.batch_size than 8' in warning
  assert line.startswith('estimate: ')


def test_memory_covers_the_largest_program(finished):
  largest = max(map(roofline.memory, finished.programs.values()))
  found = estimate._memory(finished.session) - estimate._resident()
  assert largest / 3 < found - estimate._COMPILER < 3 * largest
  assert largest < 50e6 < estimate._resident() < estimate._available()


def test_disk_is_that_of_the_checkpoints(finished):
  files = finished.workdir.rglob('*')
  size = sum(file.stat().st_size for file in files if file.is_file())
  assert estimate._disk(finished.session) == pytest.approx(size, rel=0.5)


def test_only_the_phases_that_run_are_counted(finished, monkeypatch):
  monkeypatch.setattr(estimate, '_CALIBRATION', 0.0)
  monkeypatch.setattr(estimate, '_COMPARISON', 0.0)
  session = finished.session
  assert [p.name for p in estimate._phases(session)] == [
    'warm-up',
    'generator',
    'joint',
    'student',
  ]
  config = finished.config.copy_and_resolve_references()
  config.generator.workdir = 'elsewhere'
  config.schedule.joint_steps = 0
  taken = Session(config_lib.resolve(config), finished.teacher)
  assert [p.name for p in estimate._phases(taken)] == ['student']


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(3.2, '3 s'), (89, '89 s'), (1500, '25 min'), (9000, '2.5 h')],
)
def test_duration(seconds, text):
  assert estimate._duration(seconds) == text


@pytest.mark.parametrize(
  ('size', 'text'), [(7.62e9, '7.6 GB'), (1e8, '100 MB'), (9.6e8, '1.0 GB')]
)
def test_size(size, text):
  assert estimate._size(size) == text
