"""Statistics of BatchNorm inputs for each class of a batch.

They follow from the per-sample moments, [B, C] each, by the law of total
variance. Under `jit` with a sharded batch, they cover the global batch. Their
cost does not depend on the number of classes; see `Classes`.

Shapes: B samples, C channels, K classes.

References:
  Gao et al., ClusterQ, arXiv 2205.00179, eq. 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clusterq_jax.ops.moments import EPSILON, Moments, Statistics


class Classes(NamedTuple):
  """The classes of a batch, with one row for each sample.

  A batch of B samples has at most B classes. Arrays [B, ...] are therefore
  enough, and their size does not depend on K. A sample is valid if the teacher
  predicts its label. Class statistics ignore all other samples. n is the number
  of valid samples in the class of a sample.

  Attributes:
    labels: label of each sample, int [B].
    size: n, int [B].
    together: weights [B, B]; row i has 1 / n for the valid samples of its
      class, else 0.
    first: index of the first valid sample of the class, int [B].
    share: 1 / n for valid samples, else 0, [B]. A sum over samples with these
      weights is a sum over the classes in the batch.
  """

  labels: jax.Array
  size: jax.Array
  together: jax.Array
  first: jax.Array
  share: jax.Array


def classes_of(labels: jax.Array, logits: jax.Array) -> Classes:
  """Groups a batch by class.

  Args:
    labels: labels that the generator was given, int [B].
    logits: teacher logits, [B, K].

  Returns:
    The classes; no gradient flows into them.
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
  """Averages over the valid samples of each sample's class.

  Args:
    values: [B, C].
    classes: classes of the batch.

  Returns:
    [B, C]; 0 for classes without a valid sample.
  """
  # The default precision of accelerators would round the moments.
  return jnp.matmul(
    classes.together, values, precision=jax.lax.Precision.HIGHEST
  )


def class_statistics(moments: Moments, classes: Classes) -> Statistics:
  """Computes statistics over the pixels and valid samples of each class.

  Args:
    moments: moments of each sample, [B, C] each.
    classes: classes of the batch.

  Returns:
    Statistics [B, C]. All samples of a class have equal rows. Classes without a
    valid sample have (0, sqrt(EPSILON)) and no gradient.
  """
  mean = class_mean(moments.mean, classes)
  spread = moments.var + jnp.square(moments.mean - mean)
  return Statistics(mean, jnp.sqrt(class_mean(spread, classes) + EPSILON))
