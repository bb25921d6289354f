"""Uniform quantization as pure functions, without Flax.

A quantized tensor is represented by its dequantized float values:

    x_q = step * clip(round(x / step), low, high)

With b bits, the integer codes [low, high] are:

    weights (symmetric)                       [-(2^(b-1) - 1), 2^(b-1) - 1]
    unsigned activations                      [0, 2^b - 1]
    signed activations                        [-2^(b-1), 2^(b-1) - 1]
    signed activations with a zero point Z    [-Z, 2^b - 1 - Z]

Zero is always representable. The gradient with respect to x is straight-through
inside the range and zero outside. The gradient with respect to the step is
LSQ's.

References:
  Esser et al., LSQ, arXiv 1902.08153.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from clusterq_jax.ops import channels

BITS = range(2, 9)
_TINY = 1e-8
# Keeps the largest magnitude within its range. In float32, max / (max / high)
# may exceed `high`, and the gradient of that weight would be zero.
_MARGIN = 1 + 1e-6
# Candidates of the MSE search, as fractions of the largest magnitude.
_CLIPS = tuple(i / 40 for i in range(4, 41))
# Approximate number of values of a whole tensor that the searches read.
_SAMPLE = 2**16


def weight_range(bits: int) -> tuple[int, int]:
  """Returns the smallest and largest code of weights; 2 bits are ternary."""
  high = 2 ** (bits - 1) - 1
  return -high, high


def activation_range(bits: int, signed: bool) -> tuple[int, int]:
  """Returns the smallest and largest code of activations."""
  if signed:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  return 0, 2**bits - 1


Code = int | jax.Array


@jax.custom_vjp
def fake_quant(
  x: jax.Array, step: jax.Array, low: Code, high: Code
) -> jax.Array:
  """Quantizes and dequantizes.

  Args:
    x: array of any shape.
    step: positive step, [] for the whole tensor or [C] for the last axis.
    low: smallest code; no gradient flows into it.
    high: largest code; no gradient flows into it.

  Returns:
    step * clip(round(x / step), low, high), with the shape of x.
  """
  return step * jnp.clip(jnp.round(x / step), low, high)


def _fake_quant_forward(x, step, low, high):
  return fake_quant(x, step, low, high), (x, step, low, high)


def _fake_quant_backward(residuals, g):
  x, step, low, high = residuals
  scaled = x / step
  inside = (scaled >= low) & (scaled <= high)
  dx = jnp.where(inside, g, 0.0)
  code = jnp.clip(jnp.round(scaled), low, high)
  dstep = g * (code - jnp.where(inside, scaled, 0.0))
  if not step.ndim:
    return dx, channels.whole(dstep), None, None
  axes = tuple(range(dstep.ndim - step.ndim))
  return dx, jnp.sum(dstep, axes).reshape(step.shape), None, None


fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)


def max_step(x: jax.Array, high: int, axes: tuple[int, ...]) -> jax.Array:
  """Returns the step that gives the largest magnitude the code `high`.

  Args:
    x: array of any shape.
    high: largest code.
    axes: axes to reduce.

  Returns:
    The step, with the shape of the remaining axes.
  """
  return jnp.maximum(jnp.max(jnp.abs(x), axes) * (_MARGIN / high), _TINY)


def mse_step(
  x: jax.Array, low: int, high: int, axes: tuple[int, ...]
) -> jax.Array:
  """Searches the step with the smallest mean squared error.

  The 37 candidates are fractions of `max_step`. The step of a whole tensor is
  that of a sample of its values.

  Args:
    x: array of any shape.
    low: smallest code.
    high: largest code.
    axes: leading axes to reduce.

  Returns:
    The step, with the shape of the remaining axes. No gradient flows into it.
  """
  x = lax.stop_gradient(x)
  widest = max_step(x, high, axes)
  if len(axes) == x.ndim > 1:
    x, axes = _sample(x), (0,)

  def error(clip):
    return jnp.mean(
      jnp.square(x - fake_quant(x, clip * widest, low, high)), axes
    )

  clips = jnp.asarray(_CLIPS)
  return clips[jnp.argmin(lax.map(error, clips), 0)] * widest


def _sample(x: jax.Array) -> jax.Array:
  """Returns about `_SAMPLE` values of an array [..., C], evenly spaced."""
  stride = max(1, x.size // _SAMPLE)
  # A common divisor of stride and C would leave channels out of the sample.
  while math.gcd(stride, x.shape[-1]) > 1:
    stride += 1
  return x.reshape(-1)[::stride]


def mse_zero_point(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
  """Searches the step and the zero point with the smallest mean squared error.

  The search tries 37 steps for each zero point on a sample of the values. At
  4 bits, it gains about 1 dB over `mse_step` in the last adds of a ResNet,
  which have no activation and a skewed distribution.

  Args:
    x: [..., C].
    bits: bit width.

  Returns:
    (step, zero point), [] each. The zero point is an integer in
    [0, 2^bits - 1]. No gradient flows into them.
  """
  x = _sample(lax.stop_gradient(x))
  _, high = activation_range(bits, signed=True)
  widest = max_step(x, high, (0,))

  def error(candidate):
    clip, zero = candidate
    low = -zero
    q = fake_quant(x, clip * widest, low, low + 2**bits - 1)
    return jnp.mean(jnp.square(x - q))

  clips, zeros = jnp.meshgrid(
    jnp.asarray(_CLIPS), jnp.arange(2**bits, dtype=x.dtype)
  )
  candidates = clips.reshape(-1), zeros.reshape(-1)
  best = jnp.argmin(lax.map(error, candidates))
  clip, zero = (c[best] for c in candidates)
  return clip * widest, zero
