"""Fixtures for the tests of layers."""

import numpy as np
import pytest


@pytest.fixture
def image() -> np.ndarray:
  """Returns a batch of three images, [3, 5, 7, 4]."""
  return np.random.RandomState(2).randn(3, 5, 7, 4).astype(np.float32)
