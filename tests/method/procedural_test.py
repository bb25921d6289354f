"""Procedural images have statistics like photographs."""

import functools

import jax
import numpy as np
import pytest

from clusterq_jax.method import procedural


@functools.cache
def _images(height=32, width=32, channels=3, seed=0):
  make = jax.jit(procedural.dead_leaves, static_argnums=(1, 2))
  return np.asarray(make(jax.random.key(seed), 64, (height, width, channels)))


def _correlation(a, b):
  return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.mark.parametrize('shape', [(32, 32, 3), (28, 28, 1), (24, 40, 3)])
def test_scale_of_normalised_input(shape):
  x = _images(*shape)
  assert x.shape == (64, *shape)
  assert np.all(np.isfinite(x))
  assert np.abs(x.mean((0, 1, 2))).max() < 0.4
  assert 0.7 < x.std((0, 1, 2)).min() <= x.std((0, 1, 2)).max() < 1.6


def test_images_differ():
  rows = _images().reshape(64, -1)
  between = np.corrcoef(rows) - np.eye(64)
  assert np.abs(between).max() < 0.9
  assert not np.array_equal(_images(), _images(seed=1))


def test_neighbours_are_alike_and_colours_mostly_bright_or_dark():
  x = _images()
  near = _correlation(x[:, :, 1:], x[:, :, :-1])
  far = _correlation(x[:, :, 12:], x[:, :, :-12])
  assert 0.7 < near < 0.98
  assert far < near - 0.2
  assert 0.6 < _correlation(x[..., 0], x[..., 2]) < 0.95


def test_edges_are_sharp():
  """Steps between neighbours are rare and large, so their kurtosis is high."""
  steps = np.diff(_images().mean(-1), axis=2).ravel()
  kurtosis = np.mean(steps**4) / np.mean(steps**2) ** 2
  assert kurtosis > 6  # 3 for Gaussian noise of any spectrum
