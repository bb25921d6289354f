"""Tests the line that a run prints before its first step."""

import re

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
  compiled = len(finished.compiled)
  (line,) = _said(finished, capfd)
  assert re.fullmatch(
    r'estimate: about \d+ (s|min) from here, \d+\.\d GB of memory, '
    r'\d+ MB of disk',
    line,
  )
  assert len(finished.compiled) == compiled  # the run uses the same programs


def test_memory_that_does_not_fit(finished, capfd, monkeypatch):
  monkeypatch.setattr(estimate, '_available', lambda: int(2e8))
  warning, line = _said(finished, capfd)
  assert warning.startswith('warning: the run needs about ')
  assert '200 MB are available' in warning
  assert 'config.schedule.batch_size than 8' in warning
  assert line.startswith('estimate: ')


def test_memory_is_that_of_the_process_and_its_largest_program(finished):
  largest = max(map(roofline.memory, finished.programs.values()))
  found = estimate._memory(finished.session) - estimate._resident()
  assert found == pytest.approx(largest, abs=50e6)
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
