"""Augmentation: crop and flip, and mixup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.method import augment

_SHAPE = (6, 5, 7, 3)
_run = jax.jit(augment.random_resized_crop_and_flip, static_argnums=(2, 3))


def _images():
  return np.random.RandomState(0).randn(*_SHAPE).astype(np.float32)


def _keys(probability=0.5):
  """Returns a key that does not augment the batch, and one that does."""
  found = {}
  for seed in range(50):
    key = jax.random.key(seed)
    on = bool(jax.random.bernoulli(jax.random.split(key, 6)[0], probability))
    found.setdefault(on, key)
  return found[False], found[True]


def test_probability_zero_returns_the_images_themselves():
  x = _images()
  key = jax.random.key(0)
  assert augment.random_resized_crop_and_flip(key, x, 0.0, True) is x


def test_identity_when_the_batch_is_left_alone():
  off, on = _keys()
  x = _images()
  np.testing.assert_allclose(_run(off, x, 0.5, True), x, atol=1e-6)
  changed = np.abs(np.asarray(_run(on, x, 0.5, True)) - x).max((1, 2, 3))
  assert changed.min() > 0.1  # every image of the batch


def test_about_half_of_the_batches_are_augmented():
  x = _images()
  same = [
    np.allclose(_run(jax.random.key(seed), x, 0.5, True), x, atol=1e-6)
    for seed in range(60)
  ]
  assert 15 <= sum(same) <= 45


def test_flip_is_exact(monkeypatch):
  # Each crop is the whole image, so only the mirroring remains.
  monkeypatch.setattr(augment, '_SCALE', (1.0, 1.0))
  monkeypatch.setattr(augment, '_LOG_ASPECT', 0.0)
  x = _images()
  key = jax.random.key(2)  # some flips, not all
  y = np.asarray(augment.random_resized_crop_and_flip(key, x, 1.0, True))
  mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(y, x, strict=True)]
  kept = [np.array_equal(a, b) for a, b in zip(y, x, strict=True)]
  assert np.all(np.array(mirrored) ^ np.array(kept))
  assert any(mirrored)
  assert any(kept)
  y = augment.random_resized_crop_and_flip(key, x, 1.0, False)
  np.testing.assert_array_equal(y, x)


def test_constant_images_stay_as_they_are():
  levels = np.linspace(-2, 3, _SHAPE[0] * 3).reshape(-1, 1, 1, 3)
  x = np.broadcast_to(levels, _SHAPE).astype(np.float32)
  _, on = _keys()
  np.testing.assert_allclose(_run(on, x, 0.5, True), x, atol=1e-5)


def test_crops_lie_within_the_image_and_keep_most_of_it():
  """The pixels of a ramp show the position and the size of each crop."""
  ramp = np.broadcast_to(np.arange(32.0)[:, None], (32, 32))
  x = np.stack([ramp, ramp.T], -1)[None].repeat(64, 0).astype(np.float32)
  y = np.asarray(_run(jax.random.key(1), x, 1.0, False))
  assert y.min() >= 0
  assert y.max() <= 31
  # Away from the clipped border, pixels are `fraction` apart in value.
  rows = np.diff(y[:, 8:24, 16, 0], axis=1)
  columns = np.diff(y[:, 16, 8:24, 1], axis=1)
  area = rows.mean(1) * columns.mean(1)
  assert area.min() > 0.7  # 0.8, reduced where a side is limited to 1
  assert area.max() <= 1.0 + 1e-5
  assert np.ptp(area) > 0.1
  np.testing.assert_allclose(
    rows, rows.mean(1, keepdims=True) + 0 * rows, atol=1e-4
  )


@pytest.mark.parametrize('flip', [False, True])
def test_gradient_is_the_transpose(flip):
  """Augmentation is linear, so <A x, g> = <x, A^T g> with A^T from `vjp`."""
  _, key = _keys()
  x, g = _images(), np.random.RandomState(1).randn(*_SHAPE).astype(np.float32)

  def run(x):
    return augment.random_resized_crop_and_flip(key, x, 0.5, flip)

  y, pull = jax.vjp(run, jnp.asarray(x))
  (dx,) = pull(g)
  assert np.abs(dx).max() > 0.1
  np.testing.assert_allclose(np.vdot(y, g), np.vdot(x, dx), rtol=1e-4)


def test_mixup_blends_some_images_with_another_of_the_batch():
  # Each image has one pixel of its own that is not 0.
  x = np.eye(64, dtype=np.float32).reshape(64, 8, 8, 1)
  y = np.asarray(augment.mixup(jax.random.key(0), x, 0.5)).reshape(64, 64)
  own, other = np.diag(y), np.diag(y[:, ::-1])
  np.testing.assert_allclose(own + other, 1, atol=1e-6)
  np.testing.assert_allclose(y.sum(1), 1, atol=1e-6)
  assert 20 < (own == 1).sum() < 44
  blended = own[own < 1]
  assert blended.min() < 0.2 < 0.8 < blended.max()


def test_mixup_off_changes_nothing():
  x = _images()
  assert augment.mixup(jax.random.key(0), x, 0.0) is x
