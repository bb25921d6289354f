"""Fixtures shared by the tests."""

import os
import pathlib

import pytest

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def data_dir() -> pathlib.Path:
  """The folder of real weights and images; the test is skipped without it."""
  folder = os.environ.get('CLUSTERQ_TEST_DATA')
  path = pathlib.Path(folder or _REPOSITORY.parent / 'shared' / 'data')
  if not path.is_dir():
    pytest.skip(f'no real data in {path}: set CLUSTERQ_TEST_DATA to its folder')
  return path
