"""Class centroids: EMA class statistics of the semantic layers (eq. 5).

Part of the train state; gradients never flow into them. With few samples of a
class per batch the statistics of one batch lack part of the between-sample
spread that the average over many has; the EMA follows the paper's eq. 5 (on
mean and standard deviation) all the same.

Shapes: K classes, C_l channels of semantic layer l.
"""

import jax
import jax.numpy as jnp
from flax import struct

from clusterq_jax.statistics import Statistics


class Centroids(struct.PyTreeNode):
  """layers: Statistics [K, C_l] per semantic layer; seen: bool [K]."""

  layers: tuple[Statistics, ...]
  seen: jax.Array


def empty(num_classes: int, channels: tuple[int, ...]) -> Centroids:
  """Centroids of no class yet."""
  return Centroids(
    tuple(
      Statistics(jnp.zeros((num_classes, c)), jnp.zeros((num_classes, c)))
      for c in channels
    ),
    jnp.zeros((num_classes,), bool),
  )


def update(
  centroids: Centroids,
  layers: tuple[Statistics, ...],
  seen: jax.Array,
  beta: float,
) -> Centroids:
  """Moves the centroids of the classes that were seen (eq. 5).

  Args:
    centroids: the current ones.
    layers: class statistics of a batch, [K, C_l] per semantic layer.
    seen: whether the batch has a valid sample of the class, bool [K].
    beta: weight of the new statistics.

  Returns:
    (1 - beta) old + beta new where seen; new where seen for the first time;
    old elsewhere.
  """
  weight = jnp.where(centroids.seen, beta, 1.0) * seen
  weight = weight[:, None]

  def move(old, new):
    new = jax.lax.stop_gradient(new)
    return jnp.where(weight > 0, (1 - weight) * old + weight * new, old)

  moved = jax.tree.map(move, centroids.layers, tuple(layers))
  return Centroids(moved, centroids.seen | seen)
