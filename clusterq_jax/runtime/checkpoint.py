"""Saves and restores the train state with Orbax.

Orbax writes a checkpoint to a temporary folder and renames it once it is
complete. In a bucket it marks complete checkpoints. An incomplete checkpoint is
therefore never restored. If the newest one is unreadable, the one before it is
restored and a message names the skipped one.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from clusterq_jax import sharding
from clusterq_jax.errors import InputError
from clusterq_jax.runtime import distributed

KEPT = 2


@contextlib.contextmanager
def _one_line(what: str, then: str = '') -> Iterator[None]:
  """Turns any exception of Orbax or its libraries into an InputError.

  Args:
    what: the file and the failed action.
    then: end of the message, after the reason.
  """
  try:
    yield
  except Exception as e:
    # Only the lead process writes. An error in another process, or one from
    # the devices, means that a process was lost, not that the disk failed.
    if not sharding.is_lead() or isinstance(e, jax.errors.JaxRuntimeError):
      raise
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    raise InputError(f'{what} ({reason}){then}') from e


class Checkpoints:
  """Checkpoints of one workdir, of which the newest two are kept.

      with Checkpoints(directory) as checkpoints:
        checkpoints.save(step, state, wall_s)

  A checkpoint is written in threads of Orbax while the caller goes on. It is
  complete at the next call of a method, or when the context manager is left.
  """

  def __init__(self, directory: str):
    """Opens the checkpoints of a workdir.

    Args:
      directory: a folder or gs://BUCKET/PATH; it need not exist.

    Raises:
      InputError: the directory cannot be read or written.
    """
    # Orbax raises its errors and also logs them, as pages of tracebacks.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    in_bucket = '://' in directory
    self._directory = directory if in_bucket else os.path.abspath(directory)
    with _one_line(f'{directory}: cannot be written'):
      self._checkpointer = ocp.training.Checkpointer(
        self._directory,
        preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),
        cleanup_tmp_directories=True,
      )
    self._saving: tuple[int, Any] | None = None  # step, response of Orbax

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    self.finish()

  def save(self, step: int, state: Any, wall_s: float) -> None:
    """Begins to save a checkpoint, once the one before it is complete.

    Every process has to call this. The caller may donate the state afterwards.

    Args:
      step: number of finished steps.
      state: tree of arrays.
      wall_s: wall-clock seconds that the run has taken so far.

    Raises:
      InputError: as in `finish`.
    """
    self.finish()
    with self._writing(step):
      # A checkpoint of this step exists only if it could not be restored.
      response = self._checkpointer.save_async(
        step, state, overwrite=True, custom_metadata={'wall_s': wall_s}
      )
      self._saving = step, response

  def finish(self) -> None:
    """Waits until the checkpoint of `save` is complete.

    Raises:
      InputError: the disk is full or the folder cannot be written. Only the
        lead process raises it; the others raise the exception of Orbax.
    """
    if self._saving:
      (step, response), self._saving = self._saving, None
      with self._writing(step):
        response.result()

  def _writing(self, step: int) -> contextlib.AbstractContextManager[None]:
    return _one_line(
      f'{self._directory}: checkpoint {step} cannot be written',
      '; the checkpoints before it are kept',
    )

  def restore(
    self, abstract: Any, say: Callable[[str], None]
  ) -> tuple[Any, float] | None:
    """Restores the newest checkpoint that every process can read.

    Every process has to call this, and all of them restore the same step.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.
      say: is called with one line of text for each skipped checkpoint.

    Returns:
      (state, wall-clock seconds of the run up to it), or None without a
      checkpoint.

    Raises:
      InputError: there are checkpoints, but none of them can be read.
    """
    self.finish()
    steps = distributed.common_numbers(
      [c.step for c in self._checkpointer.checkpoints]
    )
    for step in reversed(steps):
      restored, reason = None, 'by another process'
      try:
        state = self._checkpointer.load(step, abstract)
        jax.block_until_ready(state)
        metadata = self._checkpointer.metadata(step).custom_metadata or {}
        restored = state, float(metadata.get('wall_s', 0.0))
      except Exception as e:  # a damaged file raises many kinds
        reason = (str(e).strip() or repr(e)).splitlines()[0]
      # Processes that resumed from different steps would compute nonsense.
      if distributed.common_numbers([step] if restored else []):
        return restored
      say(f'checkpoint {step} cannot be read and is skipped ({reason[:200]})')
    if steps:
      raise InputError(
        f'{self._directory}: none of the checkpoints {steps} can be read; '
        'remove the folder to start again'
      )
    return None
