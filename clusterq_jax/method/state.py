"""The train state, which a checkpoint stores.

The teacher is not part of it. It never changes and is an argument of each step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from clusterq_jax.method.centroids import Centroids


class TrainState(struct.PyTreeNode):
  """The state of a run; each step receives it as a donated argument.

  Attributes:
    step: number of steps done in all phases, int32 [].
    generator: parameters of the generator.
    generator_opt: state of the generator's optimiser.
    student: {'params', 'quant'}. `params` holds weights, gains and biases. For
      `quant`, see `quant/quantizers.py`. The teacher holds the BatchNorm
      statistics.
    student_opt: state of the student's optimiser.
    centroids: class centroids of the semantic layers.
    pool: images for the student, uint8 [(P + M) * B, H, W, C], or None if
      P = M = 0; see `method/pool.py`.
    moved: images that the last student step moved and the next one uses,
      normalised, [B // 4, H, W, C]; None without such steps.
    bad_step: first step after which a loss or a parameter was not finite, or
      -1, int32 [].
  """

  step: jax.Array
  generator: Any
  generator_opt: Any
  student: Any
  student_opt: Any
  centroids: Centroids
  pool: jax.Array | None
  moved: jax.Array | None
  bad_step: jax.Array

  def count_step(self, metrics: dict[str, jax.Array]) -> 'TrainState':
    """Counts a step and records it if a value is no longer finite."""
    terms = [v for k, v in metrics.items() if k.endswith('/loss')]
    # A diverged update shows in the loss only one step later. A checkpoint may
    # lie between, so the parameters are checked here.
    norms = [optax.tree.norm(self.generator), optax.tree.norm(self.student)]
    bad = (self.bad_step < 0) & ~jnp.isfinite(sum(terms + norms))
    bad_step = jnp.where(bad, self.step, self.bad_step)
    return self.replace(step=self.step + 1, bad_step=bad_step)
