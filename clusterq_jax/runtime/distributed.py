"""Starts, synchronises and ends the processes of a distributed run."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from clusterq_jax.errors import InputError

# Environment variables of cluster managers that hold the number of processes.
_PROCESSES = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
# At their end, the other processes wait this long for the lead to evaluate.
_WAIT_S = 24 * 3600
# C code calls these functions, so they must not be garbage-collected.
_on_abort: list[object] = []
# Return value of `initialize` with mode 'auto' and no cluster.
ALONE = 'one process: no cluster found; --distributed=on overrides this'
_MOST = 8  # largest number of values that `common_numbers` compares


def initialize(
  mode: str,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> str:
  """Connects this process to the others of a distributed run.

  Call it before any other function that touches a device.

  Args:
    mode: 'off' never connects. 'auto' connects if JAX recognises a cluster
      (TPU pod, Slurm, Open MPI, Kubernetes). 'on' requires a cluster or the
      three arguments below.
    coordinator: HOST:PORT of process 0.
    processes: number of processes.
    process: number of this process, from 0.

  Returns:
    The decision and its reason, in one line.

  Raises:
    InputError: the arguments do not fit together, or the other processes
      cannot be reached.
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
  except Exception as e:  # each kind of cluster raises other exceptions
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


def tell_lost_process(reason: str) -> None:
  """Writes the last line of a process that has probably lost another one.

  Threads of JAX write a stack trace while the process ends. Whatever is written
  to stderr after this line is dropped, so that the line is easy to find.

  Args:
    reason: the error that stopped this process.
  """
  sys.stderr.flush()
  _write_last(_lost_process_line(reason))


def _lost_process_line(reason: str) -> bytes:
  return (
    f'error: process {jax.process_index()} of {jax.process_count()} stopped '
    f'({reason}). If another process was lost, start all of them again with '
    'the same command: the run resumes from the last checkpoint\n'
  ).encode()


def _write_last(line: bytes) -> None:
  stderr = os.dup(2)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  os.write(stderr, line)


def _speak_when_aborted() -> object:
  """Makes the process end with a clear line and exit code 1 if JAX aborts it.

  When the lead process is lost, a thread of JAX prints a page of text and calls
  `abort`. A handler installed with Python's `signal` would wait for the main
  thread, but `abort` does not wait. A C handler runs in the thread that calls
  `abort`.

  Returns:
    The handler; the caller has to keep it alive.
  """
  line = _lost_process_line('aborted; see above')

  def speak(_: int) -> None:
    _write_last(line)
    os._exit(1)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(speak)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)
  return handler


def common_numbers(numbers: Sequence[int]) -> list[int]:
  """Returns the sorted numbers that every process passed.

  Every process has to call this.

  Args:
    numbers: integers >= 0; only the largest `_MOST` (8) are compared.
  """
  mine = sorted(numbers)[-_MOST:]
  padded = np.array(mine + [-1] * (_MOST - len(mine)), np.int32)
  rows = multihost_utils.process_allgather(padded)
  return sorted(set.intersection(*(set(row.tolist()) for row in rows)) - {-1})


def exit_process(code: int) -> int:
  """Ends a failed process of a distributed run at once.

  A normal exit would wait for the other processes, and they would wait for this
  one. They stop once it is gone.

  Args:
    code: exit code; 0 means success.

  Returns:
    The code, if the process did not fail or is the only one.
  """
  if code and jax.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code
