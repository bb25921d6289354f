"""Tests the comparison of student and teacher on synthetic images."""

import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.runtime import synthetic


def test_images_and_blends_are_told_apart():
  """Student and teacher differ in class 3, which only blends have."""
  classes = [0, 3, 1, 2, 2, 3, 0, 1, 1, 0]  # every second one is of a blend
  images = [np.full((2, 2, 1), c, np.uint8) for c in classes]

  def teacher(x):
    assert x.shape == (4, 2, 2, 1)
    return 2.0 * jnp.eye(4)[x[:, 0, 0, 0]]

  def student(x):
    return teacher(jnp.where(x == 3, 0, x))

  p = np.exp([2.0, 0, 0, 0]) / np.sum(np.exp([2.0, 0, 0, 0]))
  assert synthetic.compare(images, teacher, student, 4) == {
    'agreement': 100.0,
    'blended_agreement': 60.0,
    'blended_divergence': pytest.approx(0.4 * 2 * (p[0] - p[1]), abs=1e-6),
    'n': 5,
  }
