"""Statistics of BatchNorm inputs: per sample, per batch, per class.

Everything derives from the per-sample moments over space, [B, C] each, so that
batch and class statistics are small algebra and are global under `jit` over a
sharded batch. Sums are in float32 at least, whatever the compute dtype. Source:
Gao et al., arXiv 2205.00179, eqs. 4 and 9; the decomposition is the law of
total variance.

Shapes: B batch, H, W space, C channels, K classes.
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
  """Mean and standard deviation: [C] of a batch, [K, C] of classes."""

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


def class_weights(
  labels: jax.Array, logits: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
  """Which samples count for which class.

  Samples that the teacher does not assign to their label are left out.

  Args:
    labels: conditioning labels, int [B].
    logits: teacher logits, [B, K].
    num_classes: K.

  Returns:
    weights [B, K], each column summing to 1 (or to 0 without a valid sample),
    and seen [K], whether the class has a valid sample.
  """
  valid = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
  member = jax.nn.one_hot(labels, num_classes) * valid[:, None]
  count = jnp.sum(member, 0)
  weights = member / jnp.maximum(count, 1.0)
  return jax.lax.stop_gradient(weights), count > 0


def class_statistics(moments: Moments, weights: jax.Array) -> Statistics:
  """Statistics of every class over its valid samples and space.

  Args:
    moments: per-sample moments, [B, C] each.
    weights: from `class_weights`, [B, K].

  Returns:
    Statistics [K, C]; rows of classes without a valid sample hold
    (0, sqrt(EPSILON)) and carry no gradient.
  """
  mean = jnp.einsum('bk,bc->kc', weights, moments.mean)
  # Each sample against the mean of its own class: [B, C], however many classes.
  own = jnp.einsum('bk,kc->bc', (weights > 0).astype(mean.dtype), mean)
  spread = moments.var + jnp.square(moments.mean - own)
  var = jnp.einsum('bk,bc->kc', weights, spread)
  return Statistics(mean, jnp.sqrt(var + EPSILON))
