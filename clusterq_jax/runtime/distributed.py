"""Several processes: their start, what they agree on, and their end."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from clusterq_jax.errors import InputError

# How many processes a cluster has started, where an environment says so.
_PROCESSES = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
# The others wait this long, at their end, while the lead evaluates.
_WAIT_S = 24 * 3600
# C calls what is in here; it must not be collected.
_on_abort: list[object] = []
# What `initialize` returns where nothing was asked for and nothing found.
ALONE = 'one process: no cluster found; --distributed=on says otherwise'
_MOST = 8  # numbers that processes compare


def initialize(
  mode: str,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> str:
  """Makes this process one of several where it is one; before any device call.

  Args:
    mode: 'auto': where JAX recognises a cluster (TPU pod, Slurm, Open MPI,
      Kubernetes); 'on': there, or with the three that follow; 'off'.
    coordinator: HOST:PORT of process 0.
    processes: how many there are.
    process: which one this is, from 0.

  Returns:
    What was decided and why, one line.

  Raises:
    InputError: settings that do not fit, or the others cannot be reached.
  """
  if mode != 'on' and (coordinator, processes, process) != (None, None, None):
    raise InputError(
      f'--distributed={mode}: --coordinator_address, --num_processes and '
      "--process_id were given; expected 'on' with them"
    )
  if mode == 'off':
    return 'one process: --distributed=off'
  for name in _PROCESSES:
    if mode == 'auto' and os.environ.get(name) == '1':
      return f'one process: {name}=1'
  try:
    jax.distributed.initialize(
      coordinator, processes, process, shutdown_timeout_seconds=_WAIT_S
    )
  except Exception as e:  # every kind of cluster raises its own
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    if mode == 'auto' and reason == 'coordinator_address should be defined.':
      return ALONE
    raise InputError(
      f'--distributed={mode}: {reason}; --distributed=off is for one process'
    ) from e
  _on_abort.append(_speak_when_aborted())
  return (
    f'process {jax.process_index()} of {jax.process_count()}, '
    f'{jax.local_device_count()} of {jax.device_count()} devices: '
    + ('cluster found' if coordinator is None else f'given {coordinator}')
  )


def lost_process_message(reason: str) -> str:
  """The last line of a process that cannot go on, most likely without others.

  Args:
    reason: what stopped it.
  """
  return (
    f'error: process {jax.process_index()} of {jax.process_count()} cannot go '
    f'on ({reason}); if that is because another one is gone, start all of them '
    'again with the same command: it resumes from the last checkpoint'
  )


def _speak_when_aborted() -> object:
  """Has the process end with a clear line, and 1, where JAX aborts it.

  JAX does so, after a page of its own, from a thread of its own, in the moment
  that the lead is gone. A handler of Python's `signal` would wait for the main
  thread, and `abort` does not wait; one of C's runs where `abort` is called.

  Returns:
    What C holds on to.
  """
  line = f'{lost_process_message("aborted, as said above")}\n'.encode()

  def speak(_: int) -> None:
    os.write(2, line)
    os._exit(1)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(speak)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)
  return handler


def common_numbers(numbers: Sequence[int]) -> list[int]:
  """Those of a few numbers >= 0 that every process has, in order.

  All processes have to call this; of each the largest `_MOST` count.
  """
  mine = sorted(numbers)[-_MOST:]
  padded = np.array(mine + [-1] * (_MOST - len(mine)), np.int32)
  rows = multihost_utils.process_allgather(padded)
  return sorted(set.intersection(*(set(row.tolist()) for row in rows)) - {-1})


def exit_process(code: int) -> int:
  """Ends a failed process of several at once; else returns the code.

  An orderly exit would wait for the others, and they for this one: they stop
  when it is gone.
  """
  if code and jax.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code
