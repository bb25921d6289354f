"""Compares statistics from per-sample moments with whole feature maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.ops.moments import EPSILON, batch_statistics, sample_moments


@pytest.fixture
def maps():
  """Returns feature maps [B, H, W, C] with different samples and channels."""
  random = np.random.RandomState(0)
  h = random.randn(7, 3, 5, 4) * random.rand(7, 1, 1, 4)
  return (h + 2 * random.randn(7, 1, 1, 4)).astype(np.float32)


def _numpy_statistics(h):
  """Computes mean and std over samples and pixels of h [B, H, W, C]."""
  pixels = h.astype(np.float64).reshape(-1, h.shape[-1])
  return pixels.mean(0), np.sqrt(pixels.var(0) + EPSILON)


def test_sample_moments(maps):
  mean, var = sample_moments(maps)
  assert mean.shape == var.shape == (7, 4)
  np.testing.assert_allclose(mean, maps.mean((1, 2)), atol=1e-5)
  np.testing.assert_allclose(var, maps.var((1, 2)), atol=1e-5)


def test_sums_stay_in_float32(maps):
  h = jnp.asarray(maps).astype(jnp.bfloat16)
  moments = sample_moments(h)
  exact = np.asarray(h.astype(jnp.float32))
  assert moments.mean.dtype == moments.var.dtype == jnp.float32
  np.testing.assert_allclose(moments.mean, exact.mean((1, 2)), atol=1e-5)
  np.testing.assert_allclose(moments.var, exact.var((1, 2)), atol=1e-5)


def test_variance_is_never_negative():
  # For constant maps, mean(h^2) - mean(h)^2 rounds to either side of 0.
  level = np.random.RandomState(0).randn(50, 1, 1, 4).astype(np.float32)
  h = np.broadcast_to(level, (50, 7, 9, 4))
  mean, var = sample_moments(h)
  assert np.any(jnp.mean(jnp.square(h), (1, 2)) < jnp.square(mean))
  assert np.all(var >= 0)


def test_batch_equals_whole_maps(maps):
  found = batch_statistics(sample_moments(maps))
  mean, std = _numpy_statistics(maps)
  np.testing.assert_allclose(found.mean, mean, atol=1e-5)
  np.testing.assert_allclose(found.std, std, atol=1e-5)


def test_zero_variance_has_finite_gradients():
  def total(h):
    found = batch_statistics(sample_moments(h))
    return jnp.sum(found.mean + found.std)

  value, gradient = jax.value_and_grad(total)(jnp.zeros((7, 3, 5, 4)))
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


def test_batch_order_does_not_matter(maps):
  found = batch_statistics(sample_moments(maps))
  other = batch_statistics(sample_moments(maps[::-1]))
  np.testing.assert_allclose(found.mean, other.mean, atol=1e-6)
  np.testing.assert_allclose(found.std, other.std, atol=1e-6)
