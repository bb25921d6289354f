"""Statistics of BatchNorm inputs: per sample, per batch, per class.

Everything derives from the per-sample moments over space, [B, C] each, so that
batch and class statistics are small algebra and are global under `jit` over a
sharded batch. Sums are in float32 at least, whatever the compute dtype. Source:
Gao et al., arXiv 2205.00179, eqs. 4 and 9; the decomposition is the law of
total variance.

The cost of class statistics does not depend on the number of classes: see
`Classes`.

Shapes: B batch, H, W space, C channels, K classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clusterq_jax.ops.moments import EPSILON, Moments, Statistics


class Classes(NamedTuple):
  """The classes of a batch, each seen from every one of its samples.

  Arrays [B, ...] instead of [K, ...]: a batch of B samples holds at most B
  classes, however many there are. A sample is valid if the teacher assigns it
  to its label; the others are left out of all class statistics. n is the number
  of valid samples of a sample's class.

  Attributes:
    labels: int [B].
    size: n, int [B].
    together: [B, B]; row i holds 1 / n for the valid samples of i's class.
    first: index of the first valid sample of the class, int [B].
    share: 1 / n for valid samples, else 0, [B]: a sum over samples weighted by
      it is a sum over the classes present.
  """

  labels: jax.Array
  size: jax.Array
  together: jax.Array
  first: jax.Array
  share: jax.Array


def classes_of(labels: jax.Array, logits: jax.Array) -> Classes:
  """Groups a batch by class.

  Args:
    labels: conditioning labels, int [B].
    logits: teacher logits, [B, K].
  """
  valid = jnp.argmax(logits, -1) == labels
  same = (labels[:, None] == labels) & valid
  size = jnp.sum(same, -1)
  scale = 1 / jnp.maximum(size, 1).astype(jnp.float32)
  return Classes(
    labels=labels,
    size=size,
    together=same * scale[:, None],
    first=jnp.argmax(same, -1),
    share=valid * scale,
  )


def class_mean(values: jax.Array, classes: Classes) -> jax.Array:
  """Mean over the valid samples of each sample's class, [B, C] of [B, C].

  0 where the class has none.
  """
  # The default precision of accelerators would round the moments.
  return jnp.matmul(
    classes.together, values, precision=jax.lax.Precision.HIGHEST
  )


def class_statistics(moments: Moments, classes: Classes) -> Statistics:
  """Statistics over space and the valid samples of each sample's class.

  Args:
    moments: per-sample moments, [B, C] each.
    classes: of the batch.

  Returns:
    Statistics [B, C], the same in all rows of a class; (0, sqrt(EPSILON)),
    without gradient, where the class has no valid sample.
  """
  mean = class_mean(moments.mean, classes)
  spread = moments.var + jnp.square(moments.mean - mean)
  return Statistics(mean, jnp.sqrt(class_mean(spread, classes) + EPSILON))
