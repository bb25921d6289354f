"""The moving average of class statistics (eq. 5)."""

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax import centroids, statistics
from clusterq_jax.statistics import Statistics

_CHANNELS = (3, 2)
_OLD_SEEN = np.array([True, True, False, False])
_NEW_SEEN = np.array([True, False, True, False])


def _layers(seed):
  random = np.random.RandomState(seed)
  return tuple(
    Statistics(
      random.randn(4, c).astype(np.float32),
      random.rand(4, c).astype(np.float32),
    )
    for c in _CHANNELS
  )


def _old():
  return centroids.Centroids(_layers(0), jnp.asarray(_OLD_SEEN))


def _pairs(*trees):
  """The corresponding arrays of several tuples of Statistics."""
  return zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)


def test_empty():
  none = centroids.empty(4, _CHANNELS)
  assert [s.mean.shape for s in none.layers] == [(4, 3), (4, 2)]
  assert [s.std.shape for s in none.layers] == [(4, 3), (4, 2)]
  np.testing.assert_array_equal(none.seen, np.zeros(4, bool))


def test_update():
  new = _layers(1)
  moved = centroids.update(_old(), new, _NEW_SEEN, 0.2)
  for old, fresh, found in _pairs(_layers(0), new, moved.layers):
    # Seen before and now; before only; now only; never.
    np.testing.assert_allclose(
      found[0], 0.8 * old[0] + 0.2 * fresh[0], rtol=1e-5
    )
    np.testing.assert_array_equal(found[1], old[1])
    np.testing.assert_array_equal(found[2], fresh[2])
    np.testing.assert_array_equal(found[3], old[3])
  np.testing.assert_array_equal(moved.seen, [True, True, True, False])


def test_repeated_updates_are_an_exponential_average():
  state = centroids.empty(4, _CHANNELS)
  seen = np.ones(4, bool)
  for seed in (1, 2, 3):
    state = centroids.update(state, _layers(seed), seen, 0.25)
  for a, b, c, found in _pairs(*map(_layers, (1, 2, 3)), state.layers):
    expected = 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_values_of_unseen_classes_are_not_looked_at():
  new = jax.tree.map(
    lambda a: np.where(_NEW_SEEN[:, None], a, np.nan), _layers(1)
  )
  moved = centroids.update(_old(), new, _NEW_SEEN, 0.2)
  for old, found in _pairs(_layers(0), moved.layers):
    assert np.all(np.isfinite(found))
    np.testing.assert_array_equal(found[1::2], old[1::2])


def test_no_gradient():
  def total(new):
    moved = centroids.update(_old(), new, _NEW_SEEN, 0.2)
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(moved.layers))

  for leaf in jax.tree.leaves(jax.grad(total)(_layers(1))):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_classes_differ():
  labels = np.array([0, 0, 1, 1])
  level = np.array([0.0, 1.0, 5.0, 9.0]).reshape(4, 1, 1, 1)
  h = (level + np.zeros((4, 3, 3, 3))).astype(np.float32)
  logits = np.eye(4, dtype=np.float32)[labels]
  weights, seen = statistics.class_weights(labels, logits, 4)
  found = statistics.class_statistics(statistics.sample_moments(h), weights)
  state = centroids.update(centroids.empty(4, (3,)), (found,), seen, 0.2)
  np.testing.assert_array_equal(state.seen, [True, True, False, False])
  layer = state.layers[0]
  np.testing.assert_allclose(layer.mean[:2], [[0.5] * 3, [7.0] * 3], rtol=1e-5)
  np.testing.assert_allclose(layer.std[:2], [[0.5] * 3, [2.0] * 3], rtol=1e-5)
