"""The train state: everything that a checkpoint holds.

The teacher is not in it: it never changes, and is an argument of every step.
"""

from typing import Any

import jax
from flax import struct

from clusterq_jax.method.centroids import Centroids


class TrainState(struct.PyTreeNode):
  """Donated to every step.

  Attributes:
    step: steps done, over all phases, int32 [].
    generator: the generator's parameters.
    generator_opt: its optimiser state.
    student: {'params', 'quant'}: weights, BatchNorm gains and biases; logs of
      quantizer steps. BatchNorm statistics are the teacher's.
    student_opt: its optimiser state.
    centroids: class centroids of the semantic layers.
    pool: recent generator images, then procedural ones, as pixels, uint8
      [(P + M) * B, H, W, C]: what student-only steps are fed with; None without
      (P = M = 0).
    bad_step: the first step whose loss was not finite, or -1, int32 [].
  """

  step: jax.Array
  generator: Any
  generator_opt: Any
  student: Any
  student_opt: Any
  centroids: Centroids
  pool: jax.Array | None
  bad_step: jax.Array
