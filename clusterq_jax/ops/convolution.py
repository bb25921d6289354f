"""2-D convolution with fast forward and backward passes on every backend.

Works around two slow parts of XLA's CPU backend. The times below are those of
jax 0.10 on two cores with AVX-512, with the options of `ops.compile`. On two
cores without AVX-512, all of it also pays with jax 0.11.2 and 0.12.0: XLA takes
3 to 50 times as long. Other backends keep XLA's convolutions, except for the
1x1 weight gradient.

1. Weight gradients, which are matrix products here:

   - at most 4 output channels, one product: for 64 to 3 channels, 32x32 pixels
     and batch 64 it takes 11 ms instead of 19 ms.
   - 1x1 kernels, one product: for 144 to 24 channels, 56x56 pixels and batch 16
     it takes 11 ms instead of 29 ms.
   - 2x2 kernels, which the generator has, one product per kernel row: for 64 to
     128 channels, 14x14 pixels and batch 64 XLA takes 930 ms.

   Other kernels keep XLA's gradient. With XLA's default options, products per
   row were faster for all 3x3 kernels. With ours they are not.

2. Depthwise convolutions. Here they are sums of shifted products. For 240
   channels, 5x5 kernels, 28x28 pixels and batch 16, the forward pass takes 5 ms
   instead of 313 ms, and the weight gradient 28 ms instead of 158 ms.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')
# int: pixels on each side. 'same': TensorFlow's padding, with up to one more
# pixel at the end. None: half the kernel's side, rounded down, on each side.
# Pads: pixels before and after, for the height and for the width.
Pads = tuple[tuple[int, int], tuple[int, int]]
Padding = int | Literal['same'] | Pads | None
Window = int | tuple[int, int]
DType = Any


def window(size: Window) -> tuple[int, int]:
  """Returns height and width of a window; an int is the side of a square."""
  return (size, size) if isinstance(size, int) else size


def explicit(
  size: tuple[int, ...],
  kernel: tuple[int, ...],
  strides: int,
  padding: Padding,
  dilation: int = 1,
) -> Pads:
  """Converts a padding to explicit numbers of pixels.

  Args:
    size: height and width of the input in pixels.
    kernel: height and width of the window in pixels.
    strides: step in both directions in pixels.
    padding: see `Padding`.
    dilation: distance between the window's taps in pixels.

  Returns:
    (before, after) for the height and for the width, in pixels.
  """
  if isinstance(padding, tuple):
    return padding

  def both(size: int, side: int) -> tuple[int, int]:
    if padding == 'same':
      reach = (side - 1) * dilation + 1
      total = max((-(-size // strides) - 1) * strides + reach - size, 0)
      return total // 2, total - total // 2
    one = side // 2 * dilation if padding is None else padding
    return one, one

  return both(size[0], kernel[0]), both(size[1], kernel[1])


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: int,
  pads: Pads,
  groups: int = 1,
  precision: lax.Precision | None = None,
  dilation: int = 1,
) -> jax.Array:
  """Convolves images, without the fast weight gradient of `conv2d`.

  Args:
    x: images, [B, H, W, I].
    kernel: weights, [kh, kw, I / groups, O].
    strides: step in both directions in pixels.
    pads: padding from `explicit`.
    groups: number of channel groups.
    precision: precision of XLA's products; depthwise convolutions on CPU have
      the precision of their dtype.
    dilation: distance between the kernel's taps in pixels.

  Returns:
    [B, H', W', O].
  """

  def xla(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel,
      (strides, strides),
      pads,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=_DIMENSIONS,
      feature_group_count=groups,
      precision=precision,
    )

  if not _depthwise(x, kernel, groups):
    return xla(x, kernel)
  cpu = functools.partial(
    _shifted_sum, strides=strides, pads=pads, dilation=dilation
  )
  return lax.platform_dependent(x, kernel, cpu=cpu, default=xla)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def conv2d(
  x: jax.Array,
  kernel: jax.Array,
  strides: int = 1,
  padding: Padding = None,
  groups: int = 1,
  dtype: DType = None,
  dilation: int = 1,
) -> jax.Array:
  """Convolves images.

  Args:
    x: images, [B, H, W, I].
    kernel: weights, [kh, kw, I / groups, O].
    strides: step in both directions in pixels.
    padding: see `Padding`.
    groups: number of channel groups.
    dtype: dtype in which the convolution and its gradients are computed; None
      keeps the dtype of x.
    dilation: distance between the kernel's taps in pixels.

  Returns:
    [B, H', W', O] in the dtype of x. H' = (H + p - r) // strides + 1, where p
    is the padding on both sides together and r = (kh - 1) dilation + 1. W' is
    computed in the same way.
  """
  pads = explicit(x.shape[1:3], kernel.shape[:2], strides, padding, dilation)
  y = convolve(
    _rounded(x, dtype),
    _rounded(kernel, dtype),
    strides,
    pads,
    groups,
    dilation=dilation,
  )
  return y.astype(x.dtype)


def _rounded(a: jax.Array, dtype: DType) -> jax.Array:
  return a if dtype is None else a.astype(dtype)


def _forward(x, kernel, strides, padding, groups, dtype, dilation):
  y = conv2d(x, kernel, strides, padding, groups, dtype, dilation)
  like = jnp.zeros((), x.dtype)
  return y, (_rounded(x, dtype), _rounded(kernel, dtype), like)


def _backward(strides, padding, groups, dtype, dilation, residuals, g):
  x, kernel, like = residuals
  gradients = _gradients(
    strides, padding, groups, dilation, x, kernel, _rounded(g, dtype)
  )
  return tuple(a.astype(like.dtype) for a in gradients)


def _gradients(strides, padding, groups, dilation, x, kernel, g):
  """Computes d loss / d x and d loss / d kernel from g = d loss / d y."""
  size = kernel.shape[:2]
  pads = explicit(x.shape[1:3], size, strides, padding, dilation)

  def convolution(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel,
      (strides, strides),
      pads,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=_DIMENSIONS,
      feature_group_count=groups,
    )

  def xla_input(g, kernel):
    return jax.vjp(lambda x: convolution(x, kernel), x)[1](g)[0]

  def xla_weight(x, g):
    return jax.vjp(lambda kernel: convolution(x, kernel), kernel)[1](g)[0]

  if _depthwise(x, kernel, groups):
    options = {'strides': strides, 'pads': pads, 'dilation': dilation}
    transposed = functools.partial(
      _shifted_sum_transposed, shape=x.shape, **options
    )
    dx = lax.platform_dependent(g, kernel, cpu=transposed, default=xla_input)
    fast = functools.partial(_depthwise_weight_gradient, size, **options)
    return dx, lax.platform_dependent(x, g, cpu=fast, default=xla_weight)
  dx = xla_input(g, kernel)
  side = size[0]
  # The fast products are for square kernels, centred and dense.
  same = pads == ((side // 2, side // 2),) * 2 and side == size[1]
  same = same and dilation == 1 and groups == 1
  if side == 1 and same:
    # A 1x1 convolution is a matrix product of the pixels that it reads.
    x = x[:, ::strides, ::strides]
    return dx, _column_gradient(side, x, g)
  few = g.shape[-1] <= 4
  if strides == 1 and same and (few or side == 2):
    fast = functools.partial(_column_gradient if few else _row_gradient, side)
    return dx, lax.platform_dependent(x, g, cpu=fast, default=xla_weight)
  return dx, xla_weight(x, g)


# --- Depthwise ---------------------------------------------------------------


def _depthwise(x, kernel, groups: int) -> bool:
  return groups > 1 and x.shape[-1] == groups == kernel.shape[-1]


def _taps(
  x: jax.Array,
  size: tuple[int, int],
  strides: int,
  pads: Pads,
  dilation: int = 1,
):
  """Returns the pixels under each kernel tap, kh * kw arrays [B, H', W', C]."""
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  height, width = (
    (pixels - (side - 1) * dilation - 1) // strides * strides + 1
    for pixels, side in zip(x.shape[1:3], size, strict=True)
  )
  return [
    x[:, i : i + height : strides, j : j + width : strides]
    for i in range(0, size[0] * dilation, dilation)
    for j in range(0, size[1] * dilation, dilation)
  ]


def patches(
  x: jax.Array,
  kernel: tuple[int, int],
  strides: int,
  padding: Padding,
  groups: int,
  dilation: int = 1,
) -> jax.Array:
  """Extracts the inputs of each output pixel of `conv2d` (im2col).

  The output of `conv2d` is the product of these patches and the kernel.

  Args:
    x: images, [B, H, W, I].
    kernel: height kh and width kw of the kernel in pixels.
    strides: step in both directions in pixels.
    padding: see `Padding`.
    groups: number G of channel groups.
    dilation: distance between the kernel's taps in pixels.

  Returns:
    [P, G, N] with P = B * H' * W' output pixels. The N = kh * kw * I / G inputs
    have the order of the kernel's leading axes.
  """
  pads = explicit(x.shape[1:3], kernel, strides, padding, dilation)
  taps = _taps(x, kernel, strides, pads, dilation)
  rows = [tap.reshape(-1, groups, tap.shape[-1] // groups) for tap in taps]
  return jnp.stack(rows, 2).reshape(len(rows[0]), groups, -1)


def exact(
  x: jax.Array,
  kernel: jax.Array,
  strides: int,
  pads: Pads,
  groups: int = 1,
  dilation: int = 1,
) -> jax.Array:
  """Convolves small integers exactly, on every platform.

  For `convolve`, a GPU's library may choose an algorithm that multiplies sums
  of inputs by fractions (Winograd) or transforms them (FFT). There, each tap of
  the kernel is one matrix product.

  Args:
    x: integers in float32, [B, H, W, I].
    kernel: integers in float32, [kh, kw, I / groups, O].
    strides: see `convolve`.
    pads: see `convolve`.
    groups: see `convolve`.
    dilation: see `convolve`.

  Returns:
    [B, H', W', O], exact if all partial sums are below 2^24.
  """
  options: Any = {
    'strides': strides,
    'pads': pads,
    'groups': groups,
    'dilation': dilation,
  }
  taps = functools.partial(_by_taps, **options)
  xla = functools.partial(convolve, precision=lax.Precision.HIGHEST, **options)
  return lax.platform_dependent(x, kernel, cpu=xla, tpu=xla, default=taps)


def _by_taps(x, kernel, *, strides, pads, groups, dilation):
  """Computes the result of `convolve` with one product for each tap."""
  if _depthwise(x, kernel, groups):
    return _shifted_sum(
      x, kernel, strides=strides, pads=pads, dilation=dilation
    )
  height, width, inputs, outputs = kernel.shape
  rows = kernel.reshape(-1, inputs, groups, outputs // groups)
  taps = _taps(x, (height, width), strides, pads, dilation)
  products = [
    jnp.einsum(
      'bhwgi,igo->bhwgo',
      tap.reshape(*tap.shape[:-1], groups, inputs),
      row,
      precision=lax.Precision.HIGHEST,
    )
    for tap, row in zip(taps, rows, strict=True)
  ]
  y = functools.reduce(jnp.add, products)
  return y.reshape(*y.shape[:3], outputs)


def _shifted_sum(x, kernel, *, strides, pads, dilation):
  """Computes a depthwise convolution as a sum of shifted products."""
  size = kernel.shape[:2]
  rows = kernel.reshape(size[0] * size[1], -1)
  taps = _taps(x, size, strides, pads, dilation)
  return sum(tap * row for tap, row in zip(taps, rows, strict=True))


def _shifted_sum_transposed(g, kernel, *, strides, pads, dilation, shape):
  """Computes d loss / d x: the flipped kernel over the dilated gradient."""
  ends = [(0, 0, 0)]
  for size, out, side, (low, high) in zip(
    shape[1:3], g.shape[1:3], kernel.shape[:2], pads, strict=True
  ):
    reach = (side - 1) * dilation
    # Pixels at the end that no window reached because of the strides.
    rest = size + low + high - reach - 1 - (out - 1) * strides
    ends.append((reach - low, reach - high + rest, strides - 1))
  g = lax.pad(g, jnp.zeros((), g.dtype), [*ends, (0, 0, 0)])
  none = ((0, 0), (0, 0))
  return _shifted_sum(
    g, kernel[::-1, ::-1], strides=1, pads=none, dilation=dilation
  )


def _depthwise_weight_gradient(size, x, g, *, strides, pads, dilation):
  """Computes d loss / d kernel of a depthwise convolution."""

  height, width, channels = g.shape[1:]
  ones = jnp.ones(height, g.dtype)

  # One image at a time stays in the cache while all taps read it. The product
  # with ones sums over its rows; see `channels`.
  def add(total, image):
    x, g = image
    taps = _taps(x[None], size, strides, pads, dilation)
    rows = [ones @ (tap[0] * g).reshape(height, -1) for tap in taps]
    return total + jnp.stack(rows), None

  zeros = jnp.zeros((size[0] * size[1], width * channels), g.dtype)
  rows, _ = lax.scan(add, zeros, (x, g))
  taps = jnp.sum(rows.reshape(-1, width, channels), 1)
  return taps.reshape(*size, 1, channels)


# --- Weight gradient ---------------------------------------------------------


def _row_gradient(side: int, x: jax.Array, g: jax.Array) -> jax.Array:
  """Computes d loss / d kernel with one product per kernel row.

  The factors are x shifted by the row, and g with all column shifts
  concatenated. Strides are 1 and the padding is side // 2.

  Args:
    side: side of the kernel in pixels.
    x: inputs, [B, H, W, I].
    g: d loss / d output, [B, H', W', O].

  Returns:
    [side, side, I, O].
  """
  pad, edge = side // 2, side - 1 - side // 2
  height, width = g.shape[1], x.shape[2]
  g = jnp.pad(g, ((0, 0), (0, 0), (edge, edge), (0, 0)))
  columns = jnp.concatenate(
    [g[:, :, j : j + width] for j in reversed(range(side))], -1
  )
  columns = columns.reshape(-1, columns.shape[-1])
  x = jnp.pad(x, ((0, 0), (pad, pad), (0, 0), (0, 0)))

  def row(i):
    pixels = x[:, i : i + height].reshape(-1, x.shape[-1])
    return lax.dot_general(pixels, columns, (((0,), (0,)), ((), ())))

  rows = jnp.stack([row(i) for i in range(side)])  # [side, I, side * O]
  rows = rows.reshape(side, x.shape[-1], side, -1)
  return rows.transpose(0, 2, 1, 3)


def _column_gradient(side: int, x: jax.Array, g: jax.Array) -> jax.Array:
  """Computes the result of `_row_gradient` with one product for all taps."""
  edge = side - 1 - side // 2
  height, width = x.shape[1:3]
  g = jnp.pad(g, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
  columns = jnp.concatenate(
    [
      g[:, i : i + height, j : j + width]
      for i in reversed(range(side))
      for j in reversed(range(side))
    ],
    -1,
  )
  x = x.reshape(-1, x.shape[-1])
  columns = columns.reshape(len(x), -1)
  taps = lax.dot_general(x, columns, (((0,), (0,)), ((), ())))
  return taps.reshape(x.shape[-1], side, side, -1).transpose(1, 2, 0, 3)


conv2d.defvjp(_forward, _backward)
