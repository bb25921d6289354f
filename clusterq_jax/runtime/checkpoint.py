"""Checkpoints of the train state, with Orbax.

A checkpoint is written to a temporary folder and renamed when whole; in a
bucket it is marked when whole. So one cut short is never taken for a whole one;
should the newest be unreadable all the same, the one before it is used, and
that is said.
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

_KEPT = 2


@contextlib.contextmanager
def _one_line(what: str, then: str = '') -> Iterator[None]:
  """Makes an InputError of what Orbax and its libraries raise, many kinds."""
  try:
    yield
  except Exception as e:
    # All meet here, but the lead alone writes. What stops the others, or comes
    # from the devices, is a process that is gone, not the disk.
    if not sharding.is_lead() or isinstance(e, jax.errors.JaxRuntimeError):
      raise
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    raise InputError(f'{what} ({reason}){then}') from e


class Checkpoints:
  """The checkpoints of one workdir, the newest two kept."""

  def __init__(self, directory: str):
    """Looks for checkpoints in a folder, or at gs://BUCKET/PATH.

    Raises:
      InputError: it cannot be read or written to.
    """
    # Its errors come as exceptions too; logged, they are pages of tracebacks.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    in_bucket = '://' in directory
    self._directory = directory if in_bucket else os.path.abspath(directory)
    with _one_line(f'{directory}: cannot be written'):
      self._checkpointer = ocp.training.Checkpointer(
        self._directory,
        preservation_policy=ocp.training.preservation_policies.LatestN(_KEPT),
        cleanup_tmp_directories=True,
      )

  def save(self, step: int, state: Any, wall_s: float) -> None:
    """Saves, and returns once the checkpoint is whole.

    Raises:
      InputError: the disk is full or the folder cannot be written to. Of
        several processes that is the lead's to say; the others raise what
        stopped them.
    """
    with _one_line(
      f'{self._directory}: checkpoint {step} cannot be written',
      '; the checkpoints before it are kept',
    ):
      # Over one that is there already: it could not be read.
      self._checkpointer.save(
        step, state, overwrite=True, custom_metadata={'wall_s': wall_s}
      )

  def restore(
    self, abstract: Any, say: Callable[[str], None]
  ) -> tuple[Any, float] | None:
    """The newest readable state and the seconds that went into it.

    Of several processes all have to call this; they restore the same state,
    which each of them could read.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.
      say: told when a checkpoint is skipped.

    Returns:
      (state, wall seconds), or None without a checkpoint.

    Raises:
      InputError: there are checkpoints and none can be read.
    """
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
      # Processes that went on from different steps would compute nonsense.
      if distributed.common_numbers([step] if restored else []):
        return restored
      say(f'checkpoint {step} cannot be read and is skipped ({reason[:200]})')
    if steps:
      raise InputError(
        f'{self._directory}: none of the checkpoints {steps} can be read; '
        'remove the folder to start again'
      )
    return None
