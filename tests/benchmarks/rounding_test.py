"""Closed-form rounding: codes are neighbours, and errors cancel."""

import numpy as np

from benchmarks import rounding


def test_squant():
  rng = np.random.RandomState(0)
  step = np.float32([0.3, 0.2, 0.25])
  kernel = rng.uniform(-1.2, 1.2, (3, 3, 4, 3)).astype(np.float32)
  codes = rounding.squant(kernel, step, 4) / step
  exact = np.clip(kernel / step, -7, 7)
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
  errors = exact - codes
  assert np.abs(errors).max() < 1
  assert np.abs(errors.sum((0, 1, 2))).max() <= 0.5 + 1e-4
  nearest = exact - np.round(exact)
  windows, before = (np.abs(e.sum((0, 1))).mean() for e in (errors, nearest))
  assert windows < before
