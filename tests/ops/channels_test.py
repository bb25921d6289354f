"""Compares sums per channel, scales, shifts and their gradients with NumPy."""

import jax
import numpy as np
import pytest

from clusterq_jax.ops import channels


@pytest.mark.parametrize('shape', [(5, 7, 6, 3), (2, 1, 1, 8)])
def test_scale_and_shift(shape):
  random = np.random.RandomState(0)
  x, g = random.randn(2, *shape).astype(np.float32)
  gain, shift = random.randn(2, shape[-1]).astype(np.float32)

  def both(function):
    y, gradients = jax.vjp(function, x, gain, shift)
    return y, *gradients(g)

  found = both(channels.scale_and_shift)
  for a, b in zip(found, both(lambda x, a, b: x * a + b), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(channels.total(g), g.sum((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize('shape', [(5, 7, 6, 3), (2, 1, 1, 8)])
def test_shift(shape):
  random = np.random.RandomState(0)
  x, g = random.randn(2, *shape).astype(np.float32)
  by = random.randn(shape[-1]).astype(np.float32)
  y, gradients = jax.vjp(channels.shift, x, by)
  np.testing.assert_allclose(y, x + by, rtol=1e-6)
  dx, dby = gradients(g)
  np.testing.assert_array_equal(dx, g)
  np.testing.assert_allclose(dby, g.sum((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize('shape', [(5, 7, 6, 3), (9, 4), (6,), ()])
def test_whole(shape):
  x = np.asarray(np.random.RandomState(0).randn(*shape))
  found = channels.whole(np.float32(x))
  np.testing.assert_allclose(found, x.sum(), rtol=1e-5, atol=1e-5)
