"""Properties of each loss, compared with independent NumPy code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.method import centroids as centroids_lib
from clusterq_jax.method import losses
from clusterq_jax.method.class_statistics import class_statistics, classes_of
from clusterq_jax.ops.moments import (
  Statistics,
  batch_statistics,
  sample_moments,
)

_CHANNELS = (3, 5)
# Four classes have one sample each. The second class does not count.
_SHARE = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
_FIRST = np.arange(4)
_KEY = jax.random.key(0)


def _classes(seed, channels=_CHANNELS, batch=4):
  random = np.random.RandomState(seed)
  return tuple(
    Statistics(
      random.randn(batch, c).astype(np.float32),
      random.rand(batch, c).astype(np.float32),
    )
    for c in channels
  )


def _row(layers, row):
  """Selects a row: [B, C_l] to [C_l] in each layer."""
  return tuple(Statistics(s.mean[row], s.std[row]) for s in layers)


def _logits(seed, batch=6, num_classes=4):
  random = np.random.RandomState(seed)
  return 3 * random.randn(batch, num_classes).astype(np.float32)


def _probabilities(logits):
  e = np.exp(logits.astype(np.float64))
  return e / e.sum(-1, keepdims=True)


def _numpy_distance(a, b):
  """Averages the squared distances of two statistics [C] over channels."""
  return sum(np.mean(np.square(x - y)) for x, y in zip(a, b, strict=True))


# --- Logits ------------------------------------------------------------------


def test_inception():
  logits, labels = _logits(0), np.array([0, 1, 2, 3, 0, 2])
  p = _probabilities(logits)[np.arange(6), labels]
  found = losses.inception_loss(logits, labels)
  np.testing.assert_allclose(found, -np.log(p).mean(), rtol=1e-5)


def test_distillation_is_kl_from_the_teacher():
  student, teacher = _logits(1), _logits(2)
  p, q = _probabilities(teacher), _probabilities(student)
  forward = np.mean(np.sum(p * np.log(p / q), -1))
  reverse = np.mean(np.sum(q * np.log(q / p), -1))
  assert abs(forward - reverse) > 0.1
  found = losses.distillation_loss(student, teacher)
  np.testing.assert_allclose(found, forward, rtol=1e-4)


def test_distillation_at_equal_logits():
  logits = _logits(1)
  # A constant added to all logits of a sample changes nothing.
  value, gradient = jax.value_and_grad(losses.distillation_loss)(
    logits, logits + np.arange(6, dtype=np.float32)[:, None]
  )
  np.testing.assert_allclose(value, 0, atol=1e-5)
  np.testing.assert_allclose(gradient, 0 * logits, atol=1e-6)


def test_distillation_survives_extreme_logits():
  student = np.array([[-1e4, 0.0]], np.float32)
  teacher = np.array([[1e4, 0.0]], np.float32)
  value, gradient = jax.value_and_grad(losses.distillation_loss)(
    student, teacher
  )
  np.testing.assert_allclose(value, 1e4)
  np.testing.assert_allclose(gradient, [[-1, 1]])


def test_features_are_compared_relative_to_the_teachers():
  random = np.random.RandomState(4)
  teacher = [random.randn(2, 3, 3, 4), 5 * random.randn(2, 2, 2, 6)]
  teacher = [np.float32(t) for t in teacher]
  student = [teacher[0] * 1.1, teacher[1] * 0.8]
  found = losses.features_loss(student, teacher)
  np.testing.assert_allclose(found, (0.1**2 + 0.2**2) / 2, rtol=1e-3)
  dead = [0 * t for t in teacher]
  np.testing.assert_array_equal(losses.features_loss(dead, dead), 0)


# --- Batch statistics --------------------------------------------------------


def test_statistics_loss():
  batch, stored = _row(_classes(0), 0), _row(_classes(1), 0)
  expected = np.mean(
    [_numpy_distance(a, b) for a, b in zip(batch, stored, strict=True)]
  )
  found = losses.statistics_loss(batch, stored)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_array_equal(losses.statistics_loss(batch, batch), 0)


def test_stored_statistics_keep_the_given_order():
  batch_stats = {
    'block10': {'mean': np.ones(2), 'var': np.array([0.0, 4.0])},
    'block2': {'mean': np.zeros(3), 'var': np.full(3, 9.0)},
  }
  second, tenth = losses.stored_statistics(batch_stats, ['block2', 'block10'])
  np.testing.assert_array_equal(second.mean, np.zeros(3))
  np.testing.assert_allclose(second.std, [3, 3, 3], rtol=1e-5)
  np.testing.assert_array_equal(tenth.mean, np.ones(2))
  np.testing.assert_allclose(tenth.std, [1e-3, 2], rtol=1e-5)


def test_a_batch_with_the_stored_statistics_costs_nothing():
  h = np.random.RandomState(0).randn(4, 3, 3, 2).astype(np.float32)
  stored = losses.stored_statistics(
    {'bn': {'mean': h.mean((0, 1, 2)), 'var': h.var((0, 1, 2))}}, ['bn']
  )
  batch = batch_statistics(sample_moments(h))
  found = losses.statistics_loss([batch], stored)
  np.testing.assert_allclose(found, 0, atol=1e-10)


# --- Class statistics --------------------------------------------------------


def test_sfda():
  classes, centroids = _classes(0), _classes(1)
  per_class = [
    np.mean(
      [
        _numpy_distance(a, b)
        for a, b in zip(_row(classes, c), _row(centroids, c), strict=True)
      ]
    )
    for c in range(4)
  ]
  total = per_class[0] + per_class[2] + per_class[3]
  found = losses.sfda_loss(classes, centroids, _SHARE)
  np.testing.assert_allclose(found, total, rtol=1e-5)
  found = losses.sfda_loss(classes, centroids, _SHARE, 'mean')
  np.testing.assert_allclose(found, total / 3, rtol=1e-5)


@pytest.mark.parametrize('count', [2, 5])
def test_equal_layers_cost_what_one_does(count):
  (a,), (b,) = _classes(0, (3,)), _classes(1, (3,))
  one = losses.sfda_loss([a], [b], _SHARE)
  many = losses.sfda_loss([a] * count, [b] * count, _SHARE)
  np.testing.assert_allclose(many, one, rtol=1e-5)
  (a,), (b,) = _row([a], 0), _row([b], 0)
  one = losses.statistics_loss([a], [b])
  many = losses.statistics_loss([a] * count, [b] * count)
  np.testing.assert_allclose(many, one, rtol=1e-5)
  # Without noise, diversity equals SFDA.
  quiet = losses.diversity_loss(
    _KEY, _classes(0), _classes(1), _SHARE, _FIRST, (0.0, 0.0)
  )
  np.testing.assert_allclose(
    quiet, losses.sfda_loss(_classes(0), _classes(1), _SHARE), rtol=1e-5
  )


def test_layers_must_correspond():
  a, b = _classes(0), _classes(1, (3,))
  with pytest.raises(ValueError, match='shorter'):
    losses.sfda_loss(a, b, _SHARE)
  with pytest.raises(ValueError, match='shorter'):
    losses.statistics_loss(_row(a, 0), _row(b, 0))


def test_a_class_counts_once_however_many_samples_it_has():
  classes, targets = _classes(0), _classes(1)
  one = [losses.sfda_loss(classes, targets, _SHARE, r) for r in ('sum', 'mean')]
  copies = np.array([0, 0, 0, 1, 2, 2, 3])
  repeat = functools.partial(jax.tree.map, lambda a: a[copies])
  share = _SHARE[copies] / np.array([3, 3, 3, 1, 2, 2, 1])
  many = [
    losses.sfda_loss(repeat(classes), repeat(targets), share, r)
    for r in ('sum', 'mean')
  ]
  np.testing.assert_allclose(many, one, rtol=1e-5)


def test_sfda_depends_on_the_labels():
  labels = np.array([0, 0, 1, 1, 2, 2])
  h = np.random.RandomState(0).randn(6, 3, 3, 2).astype(np.float32)
  h += labels.reshape(6, 1, 1, 1)
  moments = sample_moments(h)

  def of(labels):  # the teacher predicts the labels
    return classes_of(labels, np.eye(3, dtype=np.float32)[labels])

  empty = centroids_lib.empty(3, (2,))
  centroids = centroids_lib.update(empty, [moments], of(labels), 1.0)

  def loss(labels):
    classes = of(labels)
    expected, share = centroids_lib.expected(centroids, classes)
    found = class_statistics(moments, classes)
    return losses.sfda_loss([found], expected, share)

  # It is not 0: for two samples, the centroids predict half of the variance
  # between samples.
  assert loss(labels) < 0.1
  assert loss(np.array([1, 2, 0])[labels]) > 1
  # Statistics of the whole batch would not change with these labels.
  assert loss(labels[[0, 2, 1, 4, 3, 5]]) > 0.1 + loss(labels)


def test_no_class_seen():
  none = np.zeros(4, np.float32)
  classes, centroids = _classes(0), _classes(1)
  for reduction in ('sum', 'mean'):
    for function in (
      lambda c, r=reduction: losses.sfda_loss(c, centroids, none, r),
      lambda c, r=reduction: losses.diversity_loss(
        _KEY, c, centroids, none, _FIRST, (1.0, 1.0), reduction=r
      ),
    ):
      value, gradient = jax.value_and_grad(function)(classes)
      assert value == 0
      for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_gradients_reach_the_seen_classes_and_never_the_centroids():
  def sfda(classes, centroids):
    return losses.sfda_loss(classes, centroids, _SHARE)

  def diversity(classes, centroids):
    return losses.diversity_loss(
      _KEY, classes, centroids, _SHARE, _FIRST, (0.5, 1.0)
    )

  for function in (sfda, diversity):
    to_classes, to_centroids = jax.grad(function, (0, 1))(
      _classes(0), _classes(1)
    )
    for leaf in jax.tree.leaves(to_centroids):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    for leaf in jax.tree.leaves(to_classes):
      np.testing.assert_array_equal(leaf[1], np.zeros_like(leaf[1]))
      assert np.all(np.abs(leaf[_SHARE > 0]).max(-1) > 1e-3)


# --- Diversity ---------------------------------------------------------------


@functools.partial(
  jax.jit,
  static_argnames='noise',
  compiler_options={'xla_backend_optimization_level': 0},  # compiles faster
)
def _targets(key, centroids, noise, stored=None, first=_FIRST):
  """Recovers noisy centroids from the gradient at class statistics of 0."""
  zeros = jax.tree.map(jnp.zeros_like, centroids)
  share = jnp.ones(4)
  gradient = jax.grad(
    lambda c: losses.diversity_loss(
      key, c, centroids, share, first, noise, stored
    )
  )(zeros)
  return jax.tree.map(lambda g: -g * g.shape[-1] * len(centroids) / 2, gradient)


def test_diversity_is_not_sfda():
  same = _classes(0)
  assert losses.sfda_loss(same, same, _SHARE) == 0
  value, gradient = jax.value_and_grad(
    lambda c: losses.diversity_loss(_KEY, c, same, _SHARE, _FIRST, (0.5, 1.0))
  )(same)
  assert value > 0.1
  for leaf in jax.tree.leaves(gradient):
    assert np.all(np.abs(leaf[_SHARE > 0]).max(-1) > 1e-3)


def test_diversity_is_sfda_to_the_noisy_centroids():
  classes, centroids = _classes(0), _classes(1)
  targets = _targets(_KEY, centroids, (0.5, 1.0))
  found = losses.diversity_loss(
    _KEY, classes, centroids, _SHARE, _FIRST, (0.5, 1.0)
  )
  expected = losses.sfda_loss(classes, targets, _SHARE)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  mean = losses.diversity_loss(
    _KEY, classes, centroids, _SHARE, _FIRST, (0.5, 1.0), reduction='mean'
  )
  np.testing.assert_allclose(mean, expected / 3, rtol=1e-4)


def test_noise_is_fresh_for_every_key():
  centroids = _classes(1)
  one = _targets(jax.random.key(1), centroids, (0.5, 1.0))
  again = _targets(jax.random.key(1), centroids, (0.5, 1.0))
  two = _targets(jax.random.key(2), centroids, (0.5, 1.0))
  for a, b, c in zip(*map(jax.tree.leaves, (one, again, two)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


def test_noise_has_the_given_scales_and_no_correlations():
  # With centroid stds of 100, no noisy std is clipped at 0.
  size = (4, 2000)
  layer = Statistics(np.zeros(size, np.float32), np.full(size, 100, np.float32))
  targets = _targets(_KEY, (layer, layer), (0.5, 2.0))
  means = np.concatenate([t.mean for t in targets])
  stds = np.concatenate([t.std - 100 for t in targets])
  np.testing.assert_allclose(means.std(1), [0.5] * 8, rtol=0.1)
  np.testing.assert_allclose(stds.std(1), [2.0] * 8, rtol=0.1)
  # The noise of all classes, layers and moments is independent.
  correlations = np.corrcoef(np.concatenate([means, stds])) - np.eye(16)
  assert np.abs(correlations).max() < 0.15


def test_samples_of_a_class_share_its_noise():
  same = Statistics(np.zeros((4, 9), np.float32), np.full((4, 9), 50.0))
  targets = _targets(_KEY, (same,), (0.5, 1.0), first=np.array([0, 0, 2, 0]))
  for array in targets[0]:
    np.testing.assert_array_equal(array[1], array[0])
    np.testing.assert_array_equal(array[3], array[0])
    assert np.abs(array[2] - array[0]).max() > 0.1


def test_relative_statistics_do_not_depend_on_the_scale_of_a_channel():
  found, stored = _classes(0), _classes(1)
  stored = [Statistics(s.mean[0], s.std[0] + 0.1) for s in stored]

  def distance(scale):
    scaled = [
      [Statistics(s.mean * scale, s.std * scale) for s in statistics]
      for statistics in (found, stored)
    ]
    return losses.statistics_loss(
      losses.relative(scaled[0], scaled[1]),
      losses.relative(scaled[1], scaled[1]),
    )

  np.testing.assert_allclose(distance(7.0), distance(1.0), rtol=1e-5)


def test_noisy_stds_are_clipped_at_zero():
  centroids = _classes(1, (500,))
  targets = _targets(_KEY, centroids, (1.0, 3.0))[0]
  assert np.all(targets.std >= 0)
  assert 0.2 < np.mean(targets.std == 0) < 0.6
  assert np.any(targets.mean < 0)  # means are not clipped
