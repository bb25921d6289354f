"""Fixtures of the tests of weights."""

import pathlib

import pytest


@pytest.fixture
def weights(tmp_path: pathlib.Path) -> pathlib.Path:
  """Where a test writes its safetensors file."""
  return tmp_path / 'w.safetensors'
