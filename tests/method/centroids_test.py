"""Moving averages of class moments (eq. 5), and the statistics they predict."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.method import centroids, losses
from clusterq_jax.method.centroids import RawMoments
from clusterq_jax.method.class_statistics import class_statistics, classes_of
from clusterq_jax.ops.moments import Moments, sample_moments

_CHANNELS = (3, 2)
_SEEN = np.array([True, True, False, False])
_LABELS = np.array([2, 0, 1, 0, 0])
# Class 1 has no valid sample. The last sample of class 0 is not valid.
_VALID = np.array([True, True, False, True, False])
_MEMBERS = {0: [1, 3], 2: [0]}


def _classes(labels=_LABELS, valid=True, num_classes=4):
  labels = np.asarray(labels)
  logits = jax.nn.one_hot(np.where(valid, labels, labels + 1), num_classes + 1)
  return classes_of(labels, logits)


def _moments(seed, channels=_CHANNELS, batch=5):
  random = np.random.RandomState(seed)
  return tuple(
    Moments(
      random.randn(batch, c).astype(np.float32),
      random.rand(batch, c).astype(np.float32),
    )
    for c in channels
  )


def _raw(moments, members):
  """Averages raw moments over some samples, to [C] each."""
  mean, var = moments.mean[members], moments.var[members]
  return RawMoments(mean.mean(0), np.square(mean).mean(0), var.mean(0))


def _old(seed=0):
  random = np.random.RandomState(seed)

  def array(c):
    return jnp.asarray(random.rand(4, c) * _SEEN[:, None], jnp.float32)

  layers = [RawMoments(array(c), array(c), array(c)) for c in _CHANNELS]
  return centroids.Centroids(tuple(layers), jnp.asarray(_SEEN))


def test_empty():
  none = centroids.empty(4, _CHANNELS)
  for layer, c in zip(none.layers, _CHANNELS, strict=True):
    assert {a.shape for a in layer} == {(4, c)}
  np.testing.assert_array_equal(none.seen, np.zeros(4, bool))


# --- Moving averages ---------------------------------------------------------


def test_update():
  old, moments = _old(), _moments(1)
  moved = centroids.update(old, moments, _classes(valid=_VALID), 0.2)
  for i, sample in enumerate(moments):
    new = {c: _raw(sample, members) for c, members in _MEMBERS.items()}
    for j, (before, after) in enumerate(
      zip(old.layers[i], moved.layers[i], strict=True)
    ):
      # Class 0 was seen before and now, 1 before, 2 now, and 3 never.
      np.testing.assert_allclose(
        after[0], 0.8 * before[0] + 0.2 * new[0][j], rtol=1e-5
      )
      np.testing.assert_array_equal(after[1], before[1])
      np.testing.assert_array_equal(after[2], new[2][j])
      np.testing.assert_array_equal(after[3], before[3])
  np.testing.assert_array_equal(moved.seen, [True, True, True, False])


def test_without_decay_centroids_stay_as_first_seen():
  old = _old()
  moved = centroids.update(old, _moments(1), _classes(valid=_VALID), 0.0)
  for before, after in zip(
    jax.tree.leaves(old.layers), jax.tree.leaves(moved.layers), strict=True
  ):
    np.testing.assert_array_equal(after[old.seen], before[old.seen])
    assert not np.array_equal(after[2], before[2])  # seen for the first time


def test_repeated_updates_are_an_exponential_average():
  state, classes = centroids.empty(4, _CHANNELS), _classes([0, 0, 1, 1, 1])
  batches = [_moments(seed) for seed in (1, 2, 3)]
  for batch in batches:
    state = centroids.update(state, batch, classes, 0.25)
  for i, found in enumerate(state.layers):
    for c, members in ((0, [0, 1]), (1, [2, 3, 4])):
      rows = [_raw(batch[i], members) for batch in batches]
      for x, y, z, array in zip(*rows, found, strict=True):
        expected = 0.75 * (0.75 * x + 0.25 * y) + 0.25 * z
        np.testing.assert_allclose(array[c], expected, rtol=1e-5)


def test_invalid_samples_change_nothing():
  classes, moments = _classes(valid=_VALID), _moments(1)
  other = jax.tree.map(
    lambda a: np.where(_VALID[:, None], a, 1000 * a + 7), moments
  )
  a = centroids.update(_old(), moments, classes, 0.2)
  b = centroids.update(_old(), other, classes, 0.2)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  c = centroids.update(_old(), moments, _classes(valid=False), 0.2)
  jax.tree.map(np.testing.assert_array_equal, c, _old())


def test_average_of_batches_is_the_mean_over_valid_samples():
  valid = np.random.RandomState(9).rand(3, 5) < 0.7
  labels = np.random.RandomState(7).randint(0, 4, (3, 5))
  batches = [_moments(seed) for seed in (1, 2, 3)]
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)

  def batch(i):
    logits = jax.nn.one_hot(jnp.where(valid, labels, labels + 1), 5)[i]
    moments = jax.tree.map(lambda a: a[i], stacked)
    return moments, classes_of(jnp.asarray(labels)[i], logits)

  empty = centroids.empty(4, _CHANNELS)
  found = centroids.average(empty, batch, jnp.arange(3))
  members = [
    np.flatnonzero(valid.ravel() & (labels.ravel() == c)) for c in range(4)
  ]
  np.testing.assert_array_equal(found.seen, [len(m) > 0 for m in members])
  assert max(map(len, members)) > 2
  for i, layer in enumerate(found.layers):
    mean, var = (
      np.concatenate(a) for a in zip(*(b[i] for b in batches), strict=True)
    )
    for c in np.flatnonzero(found.seen):
      expected = _raw(Moments(mean, var), members[c])
      for array, wanted in zip(layer, expected, strict=True):
        np.testing.assert_allclose(array[c], wanted, rtol=1e-5)


def test_no_gradient():
  def total(moments):
    moved = centroids.update(_old(), moments, _classes(), 0.2)
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(moved.layers))

  for leaf in jax.tree.leaves(jax.grad(total)(_moments(1))):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_batch_order_does_not_matter():
  order, moments = np.array([4, 2, 0, 3, 1]), _moments(1)
  a = centroids.update(_old(), moments, _classes(valid=_VALID), 0.2)
  moments = jax.tree.map(lambda m: m[order], moments)
  classes = _classes(_LABELS[order], _VALID[order])
  b = centroids.update(_old(), moments, classes, 0.2)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), a, b)


def test_classes_differ():
  level = np.array([0.0, 1.0, 5.0, 9.0]).reshape(4, 1, 1, 1)
  h = (level + np.zeros((4, 3, 3, 3))).astype(np.float32)
  state = centroids.update(
    centroids.empty(4, (3,)),
    (sample_moments(h),),
    _classes([0, 0, 1, 1]),
    0.2,
  )
  np.testing.assert_array_equal(state.seen, [True, True, False, False])
  mean, square, var = (a[:2] for a in state.layers[0])
  np.testing.assert_allclose(mean, [[0.5] * 3, [7.0] * 3], rtol=1e-5)
  np.testing.assert_allclose(square, [[0.5] * 3, [53.0] * 3], rtol=1e-5)
  np.testing.assert_allclose(var, np.zeros((2, 3)), atol=1e-5)


# --- Predicted statistics ----------------------------------------------------

_SAMPLES = 240


@pytest.fixture(scope='module')
def many():
  """Draws moments of a class with most of its variance between samples."""
  random = np.random.RandomState(0)
  mean = 2 + 3 * random.randn(_SAMPLES, 50)
  var = 0.5 + random.rand(_SAMPLES, 50)
  return Moments(np.float32(mean), np.float32(var))


@pytest.fixture(scope='module')
def centroid(many):
  """Returns the centroid of one class from all samples at once."""
  one = _classes(np.zeros(_SAMPLES, int), num_classes=1)
  return centroids.update(centroids.empty(1, (50,)), (many,), one, 1.0)


@pytest.mark.parametrize('count', [1, 4, _SAMPLES])
def test_batches_of_any_size_are_compared_without_bias(many, centroid, count):
  # Each group of `count` samples is a class, and all classes share a centroid.
  groups = _SAMPLES // count
  classes = _classes(np.arange(_SAMPLES) // count, num_classes=groups)
  copies = jax.tree.map(lambda a: jnp.repeat(a, groups, 0), centroid)
  (expected,), share = centroids.expected(copies, classes)
  found = class_statistics(many, classes)
  np.testing.assert_allclose(jnp.sum(share), groups, rtol=1e-5)
  np.testing.assert_allclose(found.mean.mean(0), expected.mean[0], rtol=1e-4)
  ratio = np.square(found.std).mean(0) / np.square(expected.std[0])
  if count == 1:
    np.testing.assert_allclose(ratio, 1, rtol=1e-4)
  np.testing.assert_allclose(ratio.mean(), 1, atol=0.05)


def test_one_sample_at_a_time_teaches_the_variance_between_samples(many):
  alone = _classes([0], num_classes=1)

  def add(state, sample):
    sample = jax.tree.map(lambda a: a[None], sample)
    return centroids.update(state, (sample,), alone, 0.05), None

  state, _ = jax.lax.scan(add, centroids.empty(1, (50,)), many)
  crowd = _classes(np.zeros(100, int), num_classes=1)
  (expected,), _ = centroids.expected(state, crowd)
  var = many.var.mean(0) + many.mean.var(0)
  ratio = np.square(expected.std[0]) / var
  np.testing.assert_allclose(ratio.mean(), 1, atol=0.1)
  (expected,), _ = centroids.expected(state, alone)
  np.testing.assert_allclose(
    np.square(expected.std[0]), many.var.mean(0), rtol=0.3
  )


def test_only_classes_that_both_sides_have_seen_count():
  _, share = centroids.expected(_old(), _classes(valid=_VALID))
  np.testing.assert_array_equal(share, [0, 0.5, 0, 0.5, 0])


# --- Cost --------------------------------------------------------------------


def _class_part(state, moments, labels, logits, key):
  """Computes the class terms of a step, their gradient and new centroids."""
  classes = classes_of(labels, logits)

  def loss(moments):
    found = [class_statistics(m, classes) for m in moments]
    expected, share = centroids.expected(state, classes)
    return losses.sfda_loss(found, expected, share) + losses.diversity_loss(
      key, found, expected, share, classes.first, (0.5, 1.0)
    )

  gradient = jax.grad(loss)(moments)
  return centroids.update(state, moments, classes, 0.2), gradient


def _memory(num_classes):
  args = jax.eval_shape(
    lambda: (
      centroids.empty(num_classes, (64, 32)),
      jax.tree.map(jnp.asarray, _moments(0, (64, 32), 4)),
      jnp.zeros(4, int),
      jnp.zeros((4, num_classes)),
      jax.random.key(0),
    )
  )
  lowered = jax.jit(_class_part, donate_argnums=0).lower(*args)
  return lowered.compile().memory_analysis()


def test_memory_of_a_step_does_not_grow_with_the_classes():
  few, many = _memory(8), _memory(1000)
  logits = 4 * 4 * 1000  # bytes of the logits, which argmax may copy
  assert many.temp_size_in_bytes < few.temp_size_in_bytes + 2 * logits
  assert many.temp_size_in_bytes < 4 * 1000 * 64  # bytes of one moment
  # Donated centroids are updated in place.
  assert many.alias_size_in_bytes >= 3 * 4 * 1000 * 96
