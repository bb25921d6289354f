"""Class centroids: moving averages of the semantic layers' class moments.

Centroids are part of the train state. No gradient flows into them.

They follow eq. 5 with one change: they average raw moments instead of means and
standard deviations. With many classes, a batch has about one sample per class.
The standard deviation of one sample lacks the variance between samples, so
eq. 5 would lose it. Averages of raw moments are unbiased for any number of
samples. They also keep the variance within and between samples apart, so
`expected` can predict the statistics of n samples.

Two small biases remain:

- The variance between samples is too small by the variance of the averaged
  mean, a fraction beta / (2 - beta) / n. This is 1/9 for beta = 0.2 and n = 1.
- If the variance differs from sample to sample, the mean of its square root is
  smaller than the square root of its mean.

Centroids need 12 bytes per class and channel, in the state and in every
checkpoint. With K = 1,000 classes these are:

- 49 MB for ResNet-18: 4,096 channels in 12 semantic layers,
- 204 MB for EfficientNet-Lite0: 16,992 channels in 26 semantic layers.

A step reads and writes the rows of at most B classes. If the state is donated,
it writes them in place.

Shapes: B samples, K classes, C_l channels of semantic layer l.

References:
  Gao et al., ClusterQ, arXiv 2205.00179, eq. 5.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from clusterq_jax.method.class_statistics import Classes, class_mean
from clusterq_jax.ops.moments import EPSILON, Moments, Statistics


class RawMoments(NamedTuple):
  """Raw moments of each class, averaged over its samples, [K, C] each.

  Attributes:
    mean: average of the samples' means over pixels.
    square: average of the squares of these means.
    var: average of the samples' variances over pixels.
  """

  mean: jax.Array
  square: jax.Array
  var: jax.Array


class Centroids(struct.PyTreeNode):
  """The centroids of all classes in all semantic layers.

  Attributes:
    layers: raw moments of each semantic layer, [K, C_l].
    seen: whether the class has had a valid sample, bool [K].
  """

  layers: tuple[RawMoments, ...]
  seen: jax.Array


def empty(num_classes: int, channels: Sequence[int]) -> Centroids:
  """Returns centroids before any class has been seen.

  Args:
    num_classes: K.
    channels: C_l of each semantic layer.
  """
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
  """Predicts the class statistics of a batch from the centroids.

  On average, the statistics of n samples contain (n - 1) / n of the variance
  between samples. A single sample contains none of it.

  Args:
    centroids: current centroids; no gradient flows into them.
    classes: classes of the batch.

  Returns:
    A pair. First, statistics [B, C_l] of each semantic layer, in the format of
    `class_statistics.class_statistics`. Second, `classes.share`, with 0 for
    classes that the centroids have not seen, [B].
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
  """Moves the centroids of classes with valid samples in a batch (eq. 5).

  Args:
    centroids: current centroids.
    moments: moments of each sample, [B, C_l] for each semantic layer.
    classes: classes of the batch.
    beta: weight of the new moments, [] or [B] for the class of each sample.

  Returns:
    The new centroids. Classes seen before become (1 - beta) * old + beta * new.
    Classes seen for the first time become new. All others stay.
  """
  labels, batch = classes.labels, len(classes.labels)
  # Only the first valid sample of a class writes. The others get a row out of
  # range, which mode='drop' ignores.
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


def average(
  centroids: Centroids,
  batch: Callable[[jax.Array], tuple[Sequence[Moments], Classes]],
  keys: jax.Array,
) -> Centroids:
  """Averages class moments over several batches.

  Args:
    centroids: empty centroids.
    batch: makes a batch from a PRNG key. It returns the moments of each sample,
      [B, C_l] for each semantic layer, and the classes.
    keys: PRNG keys, one for each batch.

  Returns:
    The means over all valid samples of each class.
  """

  def add_batch(carry, key):
    centroids, count = carry
    moments, classes = batch(key)
    count = count.at[classes.labels].add(classes.share > 0)
    # With this weight, the moving average is the mean over all samples so far.
    beta = classes.size / jnp.maximum(count[classes.labels], 1)
    return (update(centroids, moments, classes, beta), count), None

  count = jnp.zeros((len(centroids.seen),), jnp.int32)
  (centroids, _), _ = jax.lax.scan(add_batch, (centroids, count), keys)
  return centroids
