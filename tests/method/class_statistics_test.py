"""Compares class statistics with the whole feature maps of each class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.method.class_statistics import class_statistics, classes_of
from clusterq_jax.ops.moments import EPSILON, sample_moments

_CLASSES = 5
_LABELS = np.array([0, 1, 1, 3, 1, 0, 4])
# The teacher misclassifies sample 4 of class 1, and 3, the only one of class 3.
_PREDICTED = np.array([0, 1, 1, 2, 0, 0, 4])
_LOGITS = np.eye(_CLASSES)[_PREDICTED].astype(np.float32)


@pytest.fixture
def maps():
  """Returns feature maps [B, H, W, C] with different samples and channels."""
  random = np.random.RandomState(0)
  h = random.randn(7, 3, 5, 4) * random.rand(7, 1, 1, 4)
  return (h + 2 * random.randn(7, 1, 1, 4)).astype(np.float32)


def _of_classes(h, labels=_LABELS, logits=_LOGITS):
  classes = classes_of(labels, logits)
  return class_statistics(sample_moments(h), classes)


def _numpy_statistics(h):
  """Computes mean and std over samples and pixels of h [B, H, W, C]."""
  pixels = h.astype(np.float64).reshape(-1, h.shape[-1])
  return pixels.mean(0), np.sqrt(pixels.var(0) + EPSILON)


def test_classes_equal_whole_maps_of_their_valid_samples(maps):
  found = _of_classes(maps)
  assert found.mean.shape == found.std.shape == (7, 4)
  members = {0: [0, 5], 1: [1, 2], 4: [6]}
  for i in (0, 1, 2, 4, 5, 6):  # sample 4 is not valid, but its class is
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
  # Misclassified samples have no gradient. All others have one.
  np.testing.assert_array_equal(gradient[[3, 4]], np.zeros((2, 3, 5, 4)))
  moved = np.abs(gradient).max((1, 2, 3))
  assert np.all(moved[[0, 1, 2, 5, 6]] > 0.1)


def test_zero_variance_has_finite_gradients():
  value, gradient = jax.value_and_grad(_sum_of_classes)(jnp.zeros((7, 3, 5, 4)))
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


def test_batch_order_does_not_matter(maps):
  order = np.array([3, 6, 0, 5, 1, 4, 2])
  found = _of_classes(maps)
  other = _of_classes(maps[order], _LABELS[order], _LOGITS[order])
  np.testing.assert_allclose(found.mean[order], other.mean, atol=1e-6)
  np.testing.assert_allclose(found.std[order], other.std, atol=1e-6)
