"""Mean and standard deviation of feature maps, per sample and per batch.

A batch's statistics follow from the moments of its samples over space, [B, C]
each, by the law of total variance. They are small arrays, and global under
`jit` over a sharded batch. Sums are in float32 at least, whatever the compute
dtype.

Shapes: B batch, H, W space, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Inside every square root: at zero variance the gradient of sqrt is infinite,
# even where the result is masked away.
EPSILON = 1e-6


class Moments(NamedTuple):
  """Per-sample mean and variance over space, [B, C] each."""

  mean: jax.Array
  var: jax.Array


class Statistics(NamedTuple):
  """Mean and standard deviation: [C] of a batch, [B, C] of classes."""

  mean: jax.Array
  std: jax.Array


def sample_moments(h: jax.Array) -> Moments:
  """Moments over space of feature maps h, [B, H, W, C]."""
  h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
  mean = jnp.mean(h, (1, 2))
  var = jnp.mean(jnp.square(h), (1, 2)) - jnp.square(mean)
  return Moments(mean, jnp.maximum(var, 0.0))


def batch_statistics(moments: Moments) -> Statistics:
  """Statistics over all samples and space, [C] each."""
  mean = jnp.mean(moments.mean, 0)
  var = jnp.mean(moments.var, 0) + jnp.var(moments.mean, 0)
  return Statistics(mean, jnp.sqrt(var + EPSILON))
