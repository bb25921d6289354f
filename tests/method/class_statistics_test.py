"""Statistics from per-sample moments against those of whole feature maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.method.class_statistics import class_statistics, classes_of
from clusterq_jax.ops.moments import (
  EPSILON,
  Statistics,
  batch_statistics,
  sample_moments,
)

_CLASSES = 5
_LABELS = np.array([0, 1, 1, 3, 1, 0, 4])
# The teacher's opinion: sample 4 (of class 1) and 3 (all of class 3) are wrong.
_PREDICTED = np.array([0, 1, 1, 2, 0, 0, 4])
_LOGITS = np.eye(_CLASSES)[_PREDICTED].astype(np.float32)


@pytest.fixture
def maps():
  """Feature maps [B, H, W, C] whose samples and channels differ."""
  random = np.random.RandomState(0)
  h = random.randn(7, 3, 5, 4) * random.rand(7, 1, 1, 4)
  return (h + 2 * random.randn(7, 1, 1, 4)).astype(np.float32)


def _of_classes(h, labels=_LABELS, logits=_LOGITS):
  classes = classes_of(labels, logits)
  return class_statistics(sample_moments(h), classes)


def _numpy_statistics(h):
  """Over all samples and pixels of h [B, H, W, C], in float64."""
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
  # Of constant maps: mean(h^2) - mean(h)^2 rounds to either side of 0.
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


def test_classes_equal_whole_maps_of_their_valid_samples(maps):
  found = _of_classes(maps)
  assert found.mean.shape == found.std.shape == (7, 4)
  members = {0: [0, 5], 1: [1, 2], 4: [6]}
  for i in (0, 1, 2, 4, 5, 6):  # 4 itself does not count, its class does
    mean, std = _numpy_statistics(maps[members[_LABELS[i]]])
    np.testing.assert_allclose(found.mean[i], mean, atol=1e-5)
    np.testing.assert_allclose(found.std[i], std, atol=1e-5)


def test_classes_of():
  classes = classes_of(_LABELS, _LOGITS)
  np.testing.assert_array_equal(classes.labels, _LABELS)
  np.testing.assert_array_equal(classes.size, [2, 2, 2, 0, 2, 2, 1])
  np.testing.assert_array_equal(classes.share, [0.5, 0.5, 0.5, 0, 0, 0.5, 1])
  valid = [0, 1, 2, 4, 5, 6]
  np.testing.assert_array_equal(
    np.asarray(classes.first)[valid], [0, 1, 1, 1, 0, 6]
  )
  together = np.zeros((7, 7))
  together[np.ix_([0, 5], [0, 5])] = 0.5
  together[np.ix_([1, 2, 4], [1, 2])] = 0.5
  together[6, 6] = 1
  np.testing.assert_array_equal(classes.together, together)


def test_classes_are_constants():
  def total(logits):
    classes = classes_of(_LABELS, logits)
    return jnp.sum(classes.together) + jnp.sum(classes.share)

  np.testing.assert_array_equal(jax.grad(total)(_LOGITS), 0 * _LOGITS)


@jax.jit
def _sum_of_classes(h):
  found = _of_classes(h)
  weight = 1 + jnp.arange(found.mean.size).reshape(found.mean.shape)
  return jnp.sum(weight * (found.mean + found.std))


def test_absent_classes(maps):
  found = _of_classes(maps)
  np.testing.assert_array_equal(found.mean[3], np.zeros(4))
  np.testing.assert_allclose(found.std[3], 1e-3, rtol=1e-5)
  gradient = np.asarray(jax.grad(_sum_of_classes)(maps))
  assert np.all(np.isfinite(gradient))
  # Misclassified samples move nothing, all others do.
  np.testing.assert_array_equal(gradient[[3, 4]], np.zeros((2, 3, 5, 4)))
  moved = np.abs(gradient).max((1, 2, 3))
  assert np.all(moved[[0, 1, 2, 5, 6]] > 0.1)


def test_zero_variance_has_finite_gradients():
  h = jnp.zeros((7, 3, 5, 4))

  def of_batch(h):
    found = batch_statistics(sample_moments(h))
    return jnp.sum(found.mean + found.std)

  for function in (_sum_of_classes, of_batch):
    value, gradient = jax.value_and_grad(function)(h)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_batch_order_does_not_matter(maps):
  order = np.array([3, 6, 0, 5, 1, 4, 2])
  a = _of_classes(maps)
  b = _of_classes(maps[order], _LABELS[order], _LOGITS[order])
  moments = sample_moments
  c = batch_statistics(moments(maps))
  d = batch_statistics(moments(maps[order]))
  a = Statistics(a.mean[order], a.std[order])
  for left, right in ((a, b), (c, d)):
    np.testing.assert_allclose(left.mean, right.mean, atol=1e-6)
    np.testing.assert_allclose(left.std, right.std, atol=1e-6)
