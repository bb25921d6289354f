"""Estimates time, memory and disk of a run before its first step.

By then only the program of the first phase is compiled. Its step is measured on
a state that is thrown away. All else follows from it and from the network by
ratios, which were measured on the embedded teacher and on EfficientNet-Lite0.
"""

import os
import pathlib
import sys
import time

import jax

from clusterq_jax import sharding
from clusterq_jax.layers import float_layers
from clusterq_jax.method import phases as phases_lib
from clusterq_jax.runtime import checkpoint, metrics, synthetic
from clusterq_jax.runtime.session import Session

# Times in units of a generator step.
_STEPS = {
  'generator_step': 1.0,
  'procedural_step': 0.8,
  'joint_step': 2.5,
  'student_step': 2.0,
}
_FORWARD = 0.5  # generator and teacher on a batch
_CALIBRATION = 30.0
_COMPARISON = 1.5  # teacher and student on a batch, unblended and blended
_EVALUATION = 1.0  # teacher, student and integer network on a batch
_COMPILATION = 5.0  # of the other programs, in units of the first one
_COPIES = 6.0  # of a batch's features that the largest program keeps
_COMPILER = 6e8  # memory of XLA's compiler, in bytes
_SLOW_S = 2.0  # a step from which on it is measured only once


def announce(session: Session, images: int) -> None:
  """Prints what a run needs, on stderr.

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
  """Estimates the time of a run after its first compilation, in seconds.

  Args:
    session: session of the run.
    images: number of labelled images.
  """
  phases, batch = _phases(session), session.config.schedule.batch_size
  session.prepare(phases[0], entered=True)
  state = session.init()  # compiles at the same time
  program = session.program(phases[0])
  # Late enough that no procedural image is drawn.
  state = state.replace(step=jax.numpy.full_like(state.step, phases[0].end))
  compilation = _COMPILATION * session.compile.total_seconds
  for count in (1, session.steps_per_call):  # the first waits for memory
    began = time.monotonic()
    arguments = session.arguments(count)
    state, _ = jax.block_until_ready(program(state, *arguments))
    seconds = (time.monotonic() - began) / count
    # The clocks of several processes could disagree, and with them their steps.
    if seconds > _SLOW_S and jax.process_count() == 1:
      break
  steps = sum(phase.length * _STEPS[phase.step] for phase in phases)
  steps += _CALIBRATION + _COMPARISON * synthetic.HELD_OUT / batch
  steps += _EVALUATION * images / batch
  if any('initialize_centroids' in phase.on_enter for phase in phases):
    steps += _FORWARD * session.centroid_batches
  return steps * seconds / _STEPS[phases[0].step] + compilation


def _memory(session: Session) -> int:
  """Estimates the peak memory of a run, in bytes.

  It is about proportional to the features of a batch, because the student's
  backward pass keeps them.
  """
  teacher, batch = session.teacher, session.config.schedule.batch_size
  network = teacher.build(float_layers.layer_set())
  images = (batch, *teacher.preprocessing.shape)
  features = jax.eval_shape(
    lambda variables, x: network.apply(
      variables, x, capture_intermediates=True, mutable=['intermediates']
    )[1],
    teacher.variables,
    jax.ShapeDtypeStruct(images, jax.numpy.float32),
  )
  # Devices share the batch, and on CPU also the process's memory.
  largest = _COPIES * sum(4 * leaf.size for leaf in jax.tree.leaves(features))
  state = _state_size(session)
  if _device_memory():
    return int(largest / session.mesh.size) + state
  return int(
    _resident() + _COMPILER + largest + len(jax.local_devices()) * state
  )


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
  return checkpoint.KEPT * _state_size(session)


def _state_size(session: Session) -> int:
  """Returns the size of the train state, in bytes."""
  return sum(
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
