"""Checkpoints of the train state, with Orbax.

A checkpoint is written to a temporary folder and renamed when whole, so one cut
short is never taken for a whole one; should the newest be unreadable all the
same, the one before it is used, and that is said.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from clusterq_jax import sharding
from clusterq_jax.errors import InputError

_KEPT = 2


class Checkpoints:
  """The checkpoints of one workdir, the newest two kept."""

  def __init__(self, directory: str):
    # Its errors come as exceptions too; logged, they are pages of tracebacks.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    self._directory = os.path.abspath(directory)
    try:
      self._checkpointer = ocp.training.Checkpointer(
        self._directory,
        preservation_policy=ocp.training.preservation_policies.LatestN(_KEPT),
        cleanup_tmp_directories=True,
      )
    except OSError as e:
      raise InputError(f'{directory}: cannot be written: {e.strerror}') from e

  def save(self, step: int, state: Any, wall_s: float) -> None:
    """Saves, and returns once the checkpoint is whole.

    Raises:
      InputError: the disk is full or the folder cannot be written to. Of
        several processes that is the lead's to say; the others raise what
        stopped them.
    """
    try:
      # Over one that is there already: it could not be read.
      self._checkpointer.save(
        step, state, overwrite=True, custom_metadata={'wall_s': wall_s}
      )
    except Exception as e:  # Orbax and TensorStore raise many kinds
      # All meet here, but the lead alone writes. What stops the others, or
      # comes from the devices, is a process that is gone, not the disk.
      if not sharding.is_lead() or isinstance(e, jax.errors.JaxRuntimeError):
        raise
      reason = str(e).strip().splitlines()[0] if str(e).strip() else repr(e)
      raise InputError(
        f'{self._directory}: checkpoint {step} cannot be written ({reason}); '
        'the checkpoints before it are kept'
      ) from e

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
    steps = sharding.common([c.step for c in self._checkpointer.checkpoints])
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
      if sharding.common([step] if restored else []):
        return restored
      say(f'checkpoint {step} cannot be read and is skipped ({reason[:200]})')
    if steps:
      raise InputError(
        f'{self._directory}: none of the checkpoints {steps} can be read; '
        'remove the folder to start again'
      )
    return None
