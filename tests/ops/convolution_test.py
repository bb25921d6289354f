"""Compares `conv2d` and its gradients with NumPy and XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from clusterq_jax.ops import convolution
from tests.reference import numpy_conv


@pytest.mark.parametrize(
  ('size', 'side', 'strides', 'padding', 'groups'),
  [
    ((7, 5), 3, 1, 1, 1),
    ((2, 9), 3, 1, 1, 1),
    ((1, 1), 3, 1, 1, 1),
    ((7, 5), 5, 1, 2, 1),
    ((9, 8), 3, 1, 1, 1),
    ((9, 8), 5, 1, 2, 1),
    ((7, 5), 3, 1, 0, 1),
    ((7, 5), 2, 1, 1, 1),
    ((9, 8), 2, 1, 1, 1),
    ((7, 5), 1, 1, 0, 1),
    ((7, 5), 3, 2, 1, 1),
    ((6, 5), 5, 2, 2, 1),
    ((7, 6), 1, 2, 0, 1),
    ((7, 5), 3, 1, 1, 2),
    ((7, 5), 3, 2, 1, 4),
    # Depthwise convolutions with 8 channels.
    ((7, 5), 3, 1, 1, 8),
    ((8, 7), 3, 2, 1, 8),
    ((9, 6), 5, 2, 0, 8),
    # TensorFlow's padding has one more pixel at the end, or the same number.
    ((6, 7), 3, 2, 'same', 1),
    ((7, 5), 3, 1, 'same', 1),
    ((8, 7), 5, 2, 'same', 8),
    ((5, 6), 1, 2, 'same', 1),
  ],
)
def test_convolution(size, side, strides, padding, groups):
  random = np.random.RandomState(0)
  channels = max(4, groups)
  x = random.randn(3, *size, channels).astype(np.float32)
  kernel = random.randn(side, side, channels // groups, 8).astype(np.float32)
  pads = 'SAME' if padding == 'same' else [(padding, padding)] * 2

  def xla(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel,
      (strides, strides),
      pads,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  def ours(x, kernel):
    return convolution.conv2d(x, kernel, strides, padding, groups)

  @jax.jit
  def both(x, kernel, g):
    def run(function):
      value, pullback = jax.vjp(function, x, kernel)
      return value, *pullback(g)

    return run(ours), run(xla)

  if padding == 'same':
    expected = xla(x, kernel)
  else:
    expected = numpy_conv(x, kernel, strides, padding, groups)
  g = random.randn(*expected.shape).astype(np.float32)
  found, reference = both(x, kernel, g)
  np.testing.assert_allclose(found[0], expected, atol=1e-4)
  np.testing.assert_allclose(found[1], reference[1], atol=1e-4)
  np.testing.assert_allclose(found[2], reference[2], atol=2e-4)


@pytest.mark.parametrize(
  ('side', 'strides', 'padding', 'groups', 'features', 'dilation'),
  [
    (3, 1, 1, 1, 5, 1),
    (3, 2, 'same', 1, 4, 1),
    (3, 1, ((0, 2), (1, 0)), 3, 9, 2),
    (5, 2, 1, 6, 6, 1),  # depthwise
    (1, 2, 0, 2, 4, 1),
  ],
)
def test_integers_by_taps(side, strides, padding, groups, features, dilation):
  """What GPUs compute; sums below 2^24 are exact."""
  random = np.random.RandomState(0)
  x = random.randint(-255, 256, (2, 8, 7, 6)).astype(np.float32)
  shape = side, side, 6 // groups, features
  kernel = random.randint(-127, 128, shape).astype(np.float32)
  pads = convolution.explicit(
    x.shape[1:3], shape[:2], strides, padding, dilation
  )
  expected = lax.conv_general_dilated(
    x.astype(np.int32),
    kernel.astype(np.int32),
    (strides, strides),
    pads,
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )
  options = {'strides': strides, 'pads': pads, 'dilation': dilation}
  found = convolution._by_taps(x, kernel, groups=groups, **options)
  np.testing.assert_array_equal(found, expected)
  found = convolution.exact(x, kernel, groups=groups, **options)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(('groups', 'strides'), [(1, 1), (1, 2), (8, 1)])
def test_convolution_in_bfloat16(groups, strides):
  random = np.random.RandomState(0)
  x = random.randn(3, 7, 6, 8).astype(np.float32)
  kernel = random.randn(3, 3, 8 // groups, 8).astype(np.float32)
  shape = jax.eval_shape(
    lambda x, k: convolution.conv2d(x, k, strides, 1, groups), x, kernel
  ).shape
  g = random.randn(*shape).astype(np.float32)

  def run(dtype, *arrays):
    def function(x, kernel):
      return convolution.conv2d(x, kernel, strides, 1, groups, dtype)

    value, pullback = jax.vjp(function, *arrays[:2])
    return value, *pullback(arrays[2])

  def rounded(a):
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)

  found = jax.jit(functools.partial(run, jnp.bfloat16))(x, kernel, g)
  # The reference computes with the same rounded numbers in float32.
  expected = jax.jit(functools.partial(run, None))(
    *map(rounded, (x, kernel, g))
  )
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=2**-6, atol=0.03 * np.std(b))


@pytest.mark.parametrize(
  ('side', 'strides', 'padding', 'groups', 'features'),
  [
    (3, 1, None, 1, 5),
    (3, 2, 'same', 1, 4),
    (5, 2, 1, 6, 6),  # depthwise
    (3, 1, None, 6, 12),
    (1, 2, 0, 2, 4),
  ],
)
def test_outputs_are_products_of_patches_and_kernel(
  side, strides, padding, groups, features
):
  random = np.random.RandomState(0)
  x = random.randn(2, 8, 7, 6).astype(np.float32)
  kernel = random.randn(side, side, 6 // groups, features).astype(np.float32)
  y = convolution.conv2d(x, kernel, strides, padding, groups)
  patches = convolution.patches(
    jnp.asarray(x), (side, side), strides, padding, groups
  )
  columns = kernel.reshape(-1, groups, features // groups)
  found = np.einsum('pgn,ngo->pgo', patches, columns)
  np.testing.assert_allclose(found.reshape(y.shape), y, atol=1e-4)
