"""Tests of how processes start, and of what failed ones tell."""

import os

import jax
import numpy as np
import pytest

from clusterq_jax import sharding
from clusterq_jax.errors import InputError
from clusterq_jax.runtime import checkpoint, distributed


@pytest.fixture
def initialized(monkeypatch):
  """Replaces jax.distributed.initialize; returns the arguments of its calls."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *args, **kwargs: calls.append(args)
  )
  # The handler would change what happens when the tests themselves abort.
  monkeypatch.setattr(distributed, '_speak_when_aborted', lambda: None)
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_')):
      monkeypatch.delenv(name)
  return calls


def test_off(initialized):
  assert distributed.initialize('off') == 'one process: --distributed=off'
  assert not initialized


@pytest.mark.parametrize('name', ['SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'])
def test_a_cluster_of_one(initialized, monkeypatch, name):
  monkeypatch.setenv(name, '1')
  assert distributed.initialize('auto') == f'one process: {name}=1'
  assert not initialized
  monkeypatch.setenv(name, '2')
  assert 'cluster found' in distributed.initialize('auto')
  assert initialized == [(None, None, None)]


def test_given_processes(initialized):
  reason = distributed.initialize('on', 'host:1234', 2, 1)
  assert 'given host:1234' in reason
  assert initialized == [('host:1234', 2, 1)]


def test_no_cluster(spawn):
  """Runs in a separate process, because JAX must not have been used."""
  code = (
    'from clusterq_jax.runtime import distributed;'
    'print(distributed.initialize("auto"))'
  )
  out, error = spawn('-c', code, JAX_PLATFORMS='cpu').communicate(timeout=120)
  assert out.startswith('one process: no cluster found'), error


@pytest.mark.parametrize('mode', ['auto', 'off'])
def test_settings_without_on(mode):
  with pytest.raises(InputError, match=f'--distributed={mode}: .*expected'):
    distributed.initialize(mode, 'host:1234', 2, 0)


def test_too_late():
  np.asarray(jax.numpy.zeros(1))
  with pytest.raises(InputError, match='must be called before'):
    distributed.initialize('on', 'localhost:1', 2, 0)


def test_refusal_is_one_line(spawn, tiny_config_file, tmp_path):
  process = spawn(
    '-m',
    'clusterq_jax.main',
    f'--config={tiny_config_file}',
    f'--workdir={tmp_path}',
    '--distributed=on',
    JAX_PLATFORMS='cpu',
  )
  _, error = process.communicate(timeout=120)
  assert process.returncode == 2
  assert error.startswith('error: --distributed=on: ')
  assert error.count('\n') == 1


@pytest.mark.parametrize(
  ('lead', 'kind', 'expected'),
  [
    (True, ValueError, InputError),
    (True, jax.errors.JaxRuntimeError, jax.errors.JaxRuntimeError),
    (False, ValueError, ValueError),
  ],
)
def test_whom_a_failed_save_blames(monkeypatch, tmp_path, lead, kind, expected):
  """A failed save blames the disk, the devices or another process."""
  checkpoints = checkpoint.Checkpoints(str(tmp_path))

  def save(*args, **kwargs):
    raise kind('no')

  monkeypatch.setattr(checkpoints._checkpointer, 'save_async', save)
  monkeypatch.setattr(sharding, 'is_lead', lambda: lead)
  with pytest.raises(expected, match='no'):
    checkpoints.save(1, {'x': np.zeros(1)}, 0.0)
