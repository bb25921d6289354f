"""Estimates time, memory and disk of a run before its first step.

Every program of the run is compiled first. Each kind of step then runs on a
state that is thrown away. The rest of a run is counted in units of the shortest
step. Those of a forward pass and of the calibration were measured on the
embedded teacher; the other three are guesses.
"""

import os
import pathlib
import sys
import time

import jax

from clusterq_jax import sharding
from clusterq_jax.method import phases as phases_lib
from clusterq_jax.runtime import checkpoint, metrics, roofline, synthetic
from clusterq_jax.runtime.session import Session

# In units of the shortest step.
_FORWARD = 0.5  # generator and teacher on a batch
_CALIBRATION = 40.0
_COMPARISON = 2.0  # teacher and student on a batch, unblended and blended
_EVALUATION = 1.5  # teacher, student and integer network on a batch
_COMPILATION = 0.2  # of what follows the steps, as a share of that of the steps
_SLOW_S = 2.0  # a step from which on it is measured only once


def announce(session: Session, images: int) -> None:
  """Compiles a run's programs and prints what the run needs, on stderr.

  Every process of a distributed run has to call this; the lead prints.

  Args:
    session: session of a run that starts from its first step.
    images: number of labelled images.
  """
  memory, available = _memory(session), _available()
  if memory > available:
    _say(
      f'warning: the run needs about {_size(memory)} of memory and '
      f'{_size(available)} are available; a smaller '
      f'config.schedule.batch_size than {session.config.schedule.batch_size} '
      'needs less'
    )
  seconds = _seconds(session, images)
  _say(
    f'estimate: about {_duration(seconds)} from here, {_size(memory)} of '
    f'memory, {_size(_disk(session))} of disk'
  )


def _say(text: str) -> None:
  if sharding.is_lead():
    print(text, file=sys.stderr, flush=True)


def _phases(session: Session) -> list[phases_lib.Phase]:
  """Returns the phases that the run goes through."""
  taken = session.config.generator.workdir
  start = phases_lib.student_start(session.config.schedule) if taken else 0
  return [phase for phase in session.phases if phase.start >= start]


def _seconds(session: Session, images: int) -> float:
  """Estimates the time of a run after its programs are compiled, in seconds.

  Args:
    session: session of the run.
    images: number of labelled images.
  """
  phases, batch = _phases(session), session.config.schedule.batch_size
  state, found, total = session.init(), [], 0.0
  for phase in phases:
    program = session.program(phase, state)
    # Late enough that no procedural image is drawn.
    state = state.replace(step=jax.numpy.full_like(state.step, phase.end))
    for _ in range(2):  # the first one also waits for allocations
      began = time.monotonic()
      state, _ = jax.block_until_ready(program(state, *session.step_arguments))
      seconds = time.monotonic() - began
      if seconds > _SLOW_S:
        break
    found.append(seconds)
    total += phase.length * seconds
  steps = _CALIBRATION + _COMPARISON * synthetic.HELD_OUT / batch
  steps += _EVALUATION * images / batch
  if any('initialize_centroids' in phase.on_enter for phase in phases):
    steps += _FORWARD * session.centroid_batches
  compilation = _COMPILATION * session.compile.seconds
  return total + steps * min(found) + compilation


def _memory(session: Session) -> int:
  """Estimates the peak memory of a run, in bytes."""
  programs = session.programs(_phases(session)).values()
  largest = max(map(roofline.memory, programs))
  if _device_memory():
    return largest
  # Devices share the process's memory, of which some is in use.
  return _resident() + len(jax.local_devices()) * largest


def _device_memory() -> int:
  """Returns the memory of a device, in bytes; 0 if it is the host's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit', 0)


def _resident() -> int:
  """Returns the memory that the process uses, in bytes."""
  statm = pathlib.Path('/proc/self/statm')
  if not statm.exists():  # not Linux
    return int(1e6 * metrics.peak_rss_mb())
  return int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def _available() -> int:
  """Returns the memory that the run can have, in bytes."""
  if _device_memory():
    return _device_memory()
  meminfo = pathlib.Path('/proc/meminfo')
  if not meminfo.exists():  # not Linux
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  lines = dict(
    line.split(':') for line in meminfo.read_text().splitlines() if ':' in line
  )
  free = 1024 * int(lines['MemAvailable'].split()[0]) + _resident()
  limit = pathlib.Path('/sys/fs/cgroup/memory.max')  # of a container
  if limit.exists() and limit.read_text().strip().isdigit():
    free = min(free, int(limit.read_text()))
  return free


def _disk(session: Session) -> int:
  """Estimates the size of a workdir, in bytes."""
  return checkpoint.KEPT * sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(session.abstract_state())
  )


def _duration(seconds: float) -> str:
  if seconds < 90:
    return f'{seconds:.0f} s'
  if seconds < 5400:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'


def _size(bytes: float) -> str:
  return f'{bytes / 1e9:.1f} GB' if bytes > 5e8 else f'{bytes / 1e6:.0f} MB'
