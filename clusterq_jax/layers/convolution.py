"""2-D convolution with a weight gradient that is fast on every backend.

XLA's CPU backend runs the weight gradient of a 3x3 convolution as a convolution
with an image-sized window: 5-30 GFLOP/s where the forward pass does 60-150.
Here it is, on CPU only, one matrix product per kernel tap over row-shifted
views of the zero-padded, flattened images: 24 ms instead of 94 for 16 channels
at 32x32, batch 128; the same sums in another order. Other backends keep XLA's
own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def _convolve(x, kernel, strides, padding, groups):
  return lax.conv_general_dilated(
    x,
    kernel,
    (strides, strides),
    [(padding, padding)] * 2,
    dimension_numbers=_DIMENSIONS,
    feature_group_count=groups,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv2d(
  x: jax.Array, kernel: jax.Array, strides: int, padding: int, groups: int = 1
) -> jax.Array:
  """Convolves images with a kernel.

  Args:
    x: images, [B, H, W, I].
    kernel: weights, [kh, kw, I / groups, O].
    strides: step in both directions.
    padding: zeros added on all four sides.
    groups: number of channel groups.

  Returns:
    [B, H', W', O] with H' = (H + 2 padding - kh) // strides + 1.
  """
  return _convolve(x, kernel, strides, padding, groups)


def _forward(x, kernel, strides, padding, groups):
  return _convolve(x, kernel, strides, padding, groups), (x, kernel)


def _backward(strides, padding, groups, residuals, g):
  x, kernel = residuals
  static = (strides, padding, groups)
  (dx,) = jax.vjp(lambda x: _convolve(x, kernel, *static), x)[1](g)

  def xla(x, g):
    return jax.vjp(lambda k: _convolve(x, k, *static), kernel)[1](g)[0]

  side = kernel.shape[0]
  same = kernel.shape[:2] == (side, side) and 2 * padding + 1 == side
  if strides == 1 and groups == 1 and same and side > 1:
    dk = lax.platform_dependent(
      x, g, cpu=functools.partial(_weight_gradient, side), default=xla
    )
  else:
    dk = xla(x, g)
  return dx, dk


def _weight_gradient(side: int, x: jax.Array, g: jax.Array) -> jax.Array:
  """d loss / d kernel of a stride-1 'same' convolution by shifted products.

  Flattening [B, H + r, W + r] pixels, with r = side // 2 zeros after each row
  and each image, turns the shift by one kernel tap into a shift by a number of
  flat rows, so every operand is a contiguous block.
  """
  pad = side // 2
  width = x.shape[2] + pad
  spare = ((0, 0), (0, pad), (0, pad), (0, 0))
  xs = jnp.pad(x, spare).reshape(-1, x.shape[-1])
  gs = jnp.pad(g, spare).reshape(-1, g.shape[-1])
  margin = pad * (width + 1)
  xs = jnp.pad(xs, ((margin, margin), (0, 0)))
  offsets = (jnp.arange(side)[:, None] * width + jnp.arange(side)).reshape(-1)

  def tap(offset):
    rows = lax.dynamic_slice_in_dim(xs, offset, gs.shape[0])
    return lax.dot_general(rows, gs, (((0,), (0,)), ((), ())))

  taps = lax.map(tap, offsets)
  return taps.reshape(side, side, x.shape[-1], g.shape[-1])


conv2d.defvjp(_forward, _backward)
