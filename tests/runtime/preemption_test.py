"""Tests when a run is told to stop."""

import os
import signal

import jax
import pytest
from jax.experimental import multihost_utils

from clusterq_jax.runtime import preemption


def test_sigterm():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.notice() as told_to_stop:
    assert not told_to_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert told_to_stop()
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize('largest', [0, 1, 4])
def test_processes_agree_on_a_call(monkeypatch, largest):
  """JAX says yes at one number only: the next after the largest so far.

  Args:
    largest: number of calls of the fastest process when the signal comes.
  """
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(
    multihost_utils,
    'reached_preemption_sync_point',
    lambda number: number == largest + 1,
  )
  with preemption.notice() as told_to_stop:
    told = [told_to_stop() for _ in range(6)]
  assert told == [i == largest for i in range(6)]
