"""Mean and standard deviation of feature maps, per sample and per batch.

The statistics of a batch follow from its per-sample moments by the law of total
variance. The moments are small arrays, [B, C] each. Under `jit` with a sharded
batch, the statistics cover the global batch. Sums use at least float32,
whatever the compute dtype is.

Shapes: B samples, H x W pixels, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Added to variances before every square root. At zero variance the gradient of
# sqrt is infinite, and a mask on the result does not remove it.
EPSILON = 1e-6


class Moments(NamedTuple):
  """Mean and variance over the pixels of each sample, [B, C] each."""

  mean: jax.Array
  var: jax.Array


class Statistics(NamedTuple):
  """Mean and standard deviation, [C] for a batch and [B, C] for classes."""

  mean: jax.Array
  std: jax.Array


def sample_moments(h: jax.Array) -> Moments:
  """Computes the moments of each sample over its pixels.

  Args:
    h: feature maps, [B, H, W, C].

  Returns:
    Mean and variance, [B, C] each.
  """
  h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
  mean = jnp.mean(h, (1, 2))
  var = jnp.mean(jnp.square(h), (1, 2)) - jnp.square(mean)
  return Moments(mean, jnp.maximum(var, 0.0))


def batch_statistics(moments: Moments) -> Statistics:
  """Computes statistics over all samples and pixels.

  Args:
    moments: moments of each sample, [B, C] each.

  Returns:
    Mean and standard deviation, [C] each.
  """
  mean = jnp.mean(moments.mean, 0)
  var = jnp.mean(moments.var, 0) + jnp.var(moments.mean, 0)
  return Statistics(mean, jnp.sqrt(var + EPSILON))
