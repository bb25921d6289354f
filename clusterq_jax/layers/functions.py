"""What layers without weights compute."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from clusterq_jax.models import protocol
from clusterq_jax.ops import convolution

RELU6 = 6.0


def activate(
  x: jax.Array,
  act: protocol.Activation | None,
  slope: float | jax.Array = protocol.SLOPE,
) -> jax.Array:
  """Applies an activation with torch's definition; None returns x.

  Args:
    x: array of any shape.
    act: name of the activation.
    slope: slope of leaky_relu and prelu below zero ([C] for prelu), or elu's
      limit.
  """
  if act is None:
    return x
  if act in ('leaky_relu', 'prelu'):
    return jnp.where(x > 0, x, x * slope)
  if act == 'elu':
    return jax.nn.elu(x, slope)
  return _ACTIVATIONS[act](x)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'relu': jax.nn.relu,
  'relu6': lambda x: jnp.clip(x, 0, RELU6),
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
  'hard_sigmoid': lambda x: jnp.clip(x + 3, 0, RELU6) / RELU6,
  'hard_swish': lambda x: x * (jnp.clip(x + 3, 0, RELU6) / RELU6),
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': jax.nn.gelu,
}


def pad_channels(
  x: jax.Array, features: int, strides: int, zero: int = 0
) -> jax.Array:
  """Subsamples pixels and pads channels on both sides.

  Args:
    x: [B, H, W, C].
    features: number of output channels.
    strides: distance in pixels between kept pixels, in both directions.
    zero: value of the new channels.

  Returns:
    [B, ceil(H / strides), ceil(W / strides), features].
  """
  before = (features - x.shape[-1]) // 2
  after = features - x.shape[-1] - before
  x = x[:, ::strides, ::strides]
  return jnp.pad(
    x, ((0, 0), (0, 0), (0, 0), (before, after)), constant_values=zero
  )


def _pads(x, kernel, strides, padding):
  size = convolution.window(kernel)
  return size, convolution.explicit(x.shape[1:3], size, strides, padding)


def max_pool(
  x: jax.Array,
  kernel: protocol.Window,
  strides: int,
  padding: protocol.Padding,
) -> jax.Array:
  """Returns the largest value of each window.

  Args:
    x: [B, H, W, C].
    kernel: size of the window in pixels.
    strides: step in both directions in pixels.
    padding: see `convolution.Padding`; padding is never the largest.
  """
  size, pads = _pads(x, kernel, strides, padding)
  return nn.max_pool(x, size, (strides, strides), pads)


def avg_pool(
  x: jax.Array,
  kernel: protocol.Window,
  strides: int,
  padding: protocol.Padding = 0,
  count_padding: bool = False,
) -> jax.Array:
  """Returns the mean of each window.

  Args:
    x: [B, H, W, C].
    kernel: size of the window in pixels.
    strides: step in both directions in pixels.
    padding: see `convolution.Padding`.
    count_padding: whether padded zeros count.
  """
  size, pads = _pads(x, kernel, strides, padding)
  return nn.avg_pool(
    x, size, (strides, strides), pads, count_include_pad=count_padding
  )


def pad(x: jax.Array, padding: protocol.Padding, zero: int = 0) -> jax.Array:
  """Puts zeros around a map.

  Args:
    x: [B, H, W, C].
    padding: see `convolution.Padding`.
    zero: value of the new pixels.
  """
  _, pads = _pads(x, 1, 1, padding)
  return jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=zero)


def shuffle(x: jax.Array, groups: int) -> jax.Array:
  """Transposes channels [groups, n] to [n, groups]; x is [B, H, W, C]."""
  split = x.reshape(*x.shape[:-1], groups, -1)
  return split.swapaxes(-1, -2).reshape(x.shape)


def resize(x: jax.Array, factor: int) -> jax.Array:
  """Repeats each pixel of x [B, H, W, C], factor x factor times."""
  return x.repeat(factor, 1).repeat(factor, 2)


def flatten(x: jax.Array) -> jax.Array:
  """Flattens in torch's order: channel, row, column.

  Args:
    x: [B, C] or [B, H, W, C].

  Returns:
    [B, C] or [B, C * H * W].
  """
  return jax.lax.collapse(jnp.moveaxis(x, -1, 1), 1)
