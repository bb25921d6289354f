"""Class centroids: moving averages of the semantic layers' class moments.

Part of the train state; gradients never flow into them. Source: Gao et al.,
arXiv 2205.00179, eq. 5, with one departure: raw moments are averaged, not mean
and standard deviation. With many classes a batch holds about one sample of a
class, whose standard deviation lacks the variance between samples, so eq. 5
would average that part away. Raw moments are means over samples: unbiased from
batches of any size, and they tell the two parts of the variance apart, so that
n samples are compared with what n samples should show (`expected`).

What bias remains is small. The variance between samples comes out short by the
variance of the averaged mean, a share beta / (2 - beta) / n of it: a ninth at
beta 0.2 and n = 1. And where the variance scatters from sample to sample, the
mean of its root lies below the root of its mean.

With K = 1,000 the centroids take, in the state and in every checkpoint, 49 MB
for ResNet-18 (4,096 channels in 12 semantic layers) and 204 MB for
EfficientNet-Lite0 (16,992 in 26): 12 bytes per class and channel. A step reads
and writes the rows of the at most B classes in its batch, in place if the state
is donated.

Shapes: B batch, K classes, C_l channels of semantic layer l.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from clusterq_jax.method.class_statistics import Classes, class_mean
from clusterq_jax.ops.moments import EPSILON, Moments, Statistics


class RawMoments(NamedTuple):
  """Means over the samples of a class, [K, C] each.

  Attributes:
    mean: of the samples' means over space.
    square: of the squares of these means.
    var: of the samples' variances over space.
  """

  mean: jax.Array
  square: jax.Array
  var: jax.Array


class Centroids(struct.PyTreeNode):
  """layers: RawMoments [K, C_l] per semantic layer; seen: bool [K]."""

  layers: tuple[RawMoments, ...]
  seen: jax.Array


def empty(num_classes: int, channels: Sequence[int]) -> Centroids:
  """Centroids of no class yet."""
  return Centroids(
    tuple(
      RawMoments(*(jnp.zeros((num_classes, c)) for _ in RawMoments._fields))
      for c in channels
    ),
    jnp.zeros((num_classes,), bool),
  )


def expected(
  centroids: Centroids, classes: Classes
) -> tuple[tuple[Statistics, ...], jax.Array]:
  """What the centroids expect of a batch.

  The class statistics of n samples hold (n - 1) / n of the variance between
  samples, on average: none of it for a single one.

  Args:
    centroids: the current ones; no gradient flows into them.
    classes: of the batch.

  Returns:
    Statistics [B, C_l] per semantic layer, as `statistics.class_statistics`;
    and `classes.share`, 0 where the centroids have not seen the class.
  """
  centroids = jax.lax.stop_gradient(centroids)
  between = 1 - 1 / jnp.maximum(classes.size, 1)[:, None]

  def rows(layer: RawMoments) -> Statistics:
    mean, square, var = (a[classes.labels] for a in layer)
    var = var + between * jnp.maximum(square - jnp.square(mean), 0.0)
    return Statistics(mean, jnp.sqrt(var + EPSILON))

  share = classes.share * centroids.seen[classes.labels]
  return tuple(map(rows, centroids.layers)), share


def update(
  centroids: Centroids,
  moments: Sequence[Moments],
  classes: Classes,
  beta: float | jax.Array,
) -> Centroids:
  """Moves the centroids of the classes with valid samples in a batch (eq. 5).

  Args:
    centroids: the current ones.
    moments: per-sample moments of the batch, [B, C_l] per semantic layer.
    classes: of the batch.
    beta: weight of the new moments; one, or one per sample's class, [B].

  Returns:
    (1 - beta) old + beta new where seen; new where seen for the first time;
    old elsewhere.
  """
  labels, batch = classes.labels, len(classes.labels)
  # One sample writes for its class; the row of the others does not exist.
  writes = (classes.share > 0) & (classes.first == jnp.arange(batch))
  rows = jnp.where(writes, labels, len(centroids.seen))
  weight = jnp.where(centroids.seen[labels], beta, 1.0)[:, None]

  def move(old: jax.Array, samples: jax.Array) -> jax.Array:
    new = class_mean(jax.lax.stop_gradient(samples), classes)
    new = (1 - weight) * old[labels] + weight * new
    return old.at[rows].set(new.astype(old.dtype), mode='drop')

  layers = tuple(
    RawMoments(
      move(layer.mean, sample.mean),
      move(layer.square, jnp.square(sample.mean)),
      move(layer.var, sample.var),
    )
    for layer, sample in zip(centroids.layers, moments, strict=True)
  )
  return Centroids(layers, centroids.seen.at[rows].set(True, mode='drop'))
