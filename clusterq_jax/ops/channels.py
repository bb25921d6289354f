"""Sums over pixels, channel by channel, and what has them in its gradient.

XLA's CPU backend adds up pixels in a loop per channel: 6.8 ms for 32 channels
at 32x32, batch 128, on two cores. Images first, by a product with ones, takes
0.4, and its rounding error is a tenth as large.
"""

import jax
import jax.numpy as jnp
from jax import lax


def total(x: jax.Array) -> jax.Array:
  """The sum over images and pixels: [B, H, W, C] to [C]."""

  def images_first(x):
    images = jnp.ones(len(x), x.dtype) @ x.reshape(len(x), -1)
    return jnp.sum(images.reshape(-1, x.shape[-1]), 0)

  def at_once(x):
    return jnp.sum(x, (0, 1, 2))

  return lax.platform_dependent(x, cpu=images_first, default=at_once)


@jax.custom_vjp
def scale_and_shift(
  x: jax.Array, gain: jax.Array, shift: jax.Array
) -> jax.Array:
  """x * gain + shift; x [B, H, W, C], gain and shift [C]."""
  return x * gain + shift


def _forward(x, gain, shift):
  return scale_and_shift(x, gain, shift), (x, gain)


def _backward(residuals, g):
  x, gain = residuals
  return g * gain, total(g * x), total(g)


scale_and_shift.defvjp(_forward, _backward)
