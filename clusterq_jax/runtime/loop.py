"""Runs the training loop."""

import itertools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clusterq_jax import sharding
from clusterq_jax.errors import InputError
from clusterq_jax.method.phases import Phase
from clusterq_jax.method.state import TrainState
from clusterq_jax.runtime import bucket, preemption, synthetic
from clusterq_jax.runtime import metrics as metrics_lib
from clusterq_jax.runtime.session import Session

# The first steps of a process are not profiled: they wait for allocations.
_BEFORE_TRACE = 3


class _Log:
  """Writer of metrics.jsonl and the progress line, one logging interval late.

  It fetches the metrics of a step long after the device has computed them, so
  the loop never waits for the device.
  """

  def __init__(self, session: Session, folder: pathlib.Path, done: int):
    lead = sharding.is_lead()
    file = folder / 'metrics.jsonl' if lead else pathlib.Path(os.devnull)
    self._folder = folder
    self._file = metrics_lib.MetricsFile(file, done)
    self._pending: list[tuple[int, str, Any]] = []
    self.total = session.phases[-1].end
    self.progress = metrics_lib.Progress(
      self.total, done, session.config.schedule.batch_size, silent=not lead
    )
    if done:
      self.progress.say(
        f'{bucket.address(folder)}: resuming at step {done} of {self.total}'
      )

  def note(self, done: int, phase: str, values: Any, bad: jax.Array) -> None:
    """Queues the metrics of a step and writes the metrics queued before.

    Args:
      done: number of finished steps.
      phase: name of the phase.
      values: scalar arrays by name, on the device.
      bad: first step without a finite loss, -1 if there is none.
    """
    self._pending.append((done, phase, (values, bad)))
    self.flush(keep=1)

  def flush(self, keep: int = 0) -> None:
    """Fetches and writes the queued metrics.

    Args:
      keep: number of newest entries to leave in the queue; their steps may
        still be running.

    Raises:
      InputError: the loss or the weights are no longer finite.
    """
    while len(self._pending) > keep:
      step, phase, (values, bad) = self._pending.pop(0)
      values, bad = jax.device_get((values, bad))
      if bad >= 0:
        self.progress.close()
        raise InputError(
          f'loss or weights are not finite from step {bad + 1} on; the last '
          f'good checkpoint is kept in {self._folder / "checkpoints"}. Try a '
          'lower config.generator.lr or config.student.lr in another workdir'
        )
      self._file.write(step, values)
      self.progress.update(step, phase, values)

  def preempted(self, done: int) -> preemption.Preempted:
    """Ends the progress line; returns the exception of a saved stop."""
    self.progress.close()
    return preemption.Preempted(
      f'stopped by SIGTERM after step {done} of {self.total}; the state is '
      f'saved in {self._folder}, and the same command resumes from there'
    )


def _profiled(session: Session, start: int) -> range:
  """Returns the steps that the lead profiles."""
  count = session.config.report.trace_steps
  return range(start + _BEFORE_TRACE, session.phases[-1].end)[:count]


def _count(session: Session, phase: Phase, done: int, traced: range) -> int:
  """Returns how many steps the next call makes.

  A call ends with its phase, and where a log line, a checkpoint or a profile is
  due. All processes of a distributed run arrive at the same number.

  Args:
    session: session of the run.
    phase: phase of the next step.
    done: number of finished steps.
    traced: steps that the lead profiles.
  """
  config = session.config
  regular = [
    (done // every + 1) * every
    for every in (config.report.log_every, config.checkpoint_every)
  ]
  profile = [traced.start, traced.stop] if traced else []
  ends = [*regular, *profile, phase.end]
  nearest = min(end for end in ends if end > done)
  return min(session.steps_per_call, nearest - done)


def train(
  session: Session,
  state: TrainState,
  folder: pathlib.Path,
  save: Callable[[int, TrainState], None],
) -> tuple[TrainState, float | None]:
  """Runs the remaining steps of a run.

  Args:
    session: the session of the run.
    state: state before the first step, or the restored state.
    folder: folder to write metrics.jsonl and trace/ to.
    save: saves a checkpoint; its arguments are the number of finished steps
      and the state.

  Returns:
    (final state, images per second without compilation). The rate is None if
    no step remained.

  Raises:
    InputError: the loss or the weights are no longer finite.
    Preempted: the process received SIGTERM and saved its state.
  """
  config = session.config
  start = done = int(state.step)
  traced = _profiled(session, start)
  profiles = bool(traced) and sharding.is_lead()
  log = _Log(session, folder, done)
  began, compiled_before = time.monotonic(), session.compile.seconds
  with preemption.notice() as told_to_stop:
    phases = [phase for phase in session.phases if phase.end > done]
    for phase, following in itertools.zip_longest(phases, phases[1:]):
      session.prepare(phase, entered=done > phase.start)
      if following is not None:
        session.prepare(following)
      program = session.program(phase)
      if done == phase.start:
        state = session.enter(phase, state)
      if following is None:
        # Not while the student is calibrated: both take much memory.
        jax.block_until_ready(state)
        synthetic.prepare(session)
      while done < phase.end:
        if profiles and done == traced.start:
          jax.profiler.start_trace(str(folder / 'trace'))
        count = _count(session, phase, done, traced)
        state, values = program(state, *session.arguments(count))
        done += count
        if profiles and done == traced.stop:
          jax.block_until_ready(values)
          jax.profiler.stop_trace()
        last = done == log.total
        stop = told_to_stop() and not last
        if done % config.report.log_every == 0 or last:
          # The next step donates the state, so the log keeps a copy.
          log.note(done, phase.name, values, jnp.copy(state.bad_step))
        if stop or done % config.checkpoint_every == 0 or last:
          log.flush()
          if int(state.bad_step) < 0:
            save(done, state)
        if stop:
          raise log.preempted(done)
      del program
      if following is None or following.step != phase.step:
        session.forget(phase.step)
  log.flush()
  log.progress.close()
  compiled = session.compile.seconds - compiled_before
  seconds = time.monotonic() - began - compiled
  rate = (done - start) * config.schedule.batch_size / seconds
  return state, round(rate, 1) if done > start else None
