"""Sums of maps, and scales and shifts per channel that use them.

Works around XLA's CPU backend (jax 0.10.2, 0.11.2 and 0.12.0):

- It sums pixels channel by channel. For an array [128, 32, 32, 32], this takes
  6.8 ms on two cores. Summing over images first, by a product with ones, takes
  0.4 ms. Its rounding error is a tenth as large.
- It sums a whole array in one slow loop. Two sums take 0.4 to 0.6 of its time.
"""

import jax
import jax.numpy as jnp
from jax import lax


def total(x: jax.Array) -> jax.Array:
  """Sums over images and pixels.

  Args:
    x: [B, H, W, C].

  Returns:
    The sum of each channel, [C].
  """

  def images_first(x):
    images = jnp.ones(len(x), x.dtype) @ x.reshape(len(x), -1)
    return jnp.sum(images.reshape(-1, x.shape[-1]), 0)

  def at_once(x):
    return jnp.sum(x, (0, 1, 2))

  return lax.platform_dependent(x, cpu=images_first, default=at_once)


def whole(x: jax.Array) -> jax.Array:
  """Sums all values of an array of any shape, to []."""
  if x.ndim > 1:
    x = lax.optimization_barrier(jnp.sum(x, -1))
  return jnp.sum(x)


@jax.custom_vjp
def scale_and_shift(
  x: jax.Array, gain: jax.Array, shift: jax.Array
) -> jax.Array:
  """Computes x * gain + shift with fast gradients on CPU.

  Args:
    x: [B, H, W, C].
    gain: factor of each channel, [C].
    shift: summand of each channel, [C].

  Returns:
    [B, H, W, C].
  """
  return x * gain + shift


def _forward(x, gain, shift):
  return scale_and_shift(x, gain, shift), (x, gain)


def _backward(residuals, g):
  x, gain = residuals
  return g * gain, total(g * x), total(g)


scale_and_shift.defvjp(_forward, _backward)


@jax.custom_vjp
def shift(x: jax.Array, by: jax.Array) -> jax.Array:
  """Computes x + by with a fast gradient on CPU.

  Args:
    x: [B, H, W, C].
    by: summand of each channel, [C].

  Returns:
    [B, H, W, C].
  """
  return x + by


shift.defvjp(lambda x, by: (shift(x, by), None), lambda _, g: (g, total(g)))
