"""The accuracy benchmark: whose generator a run takes, and its table."""

import dataclasses
import pathlib
import runpy
import types

import pytest

_FILE = (
  pathlib.Path(__file__).resolve().parents[2] / 'benchmarks' / 'accuracy.py'
)


@pytest.fixture(scope='module')
def accuracy():
  return types.SimpleNamespace(**runpy.run_path(str(_FILE)))


def test_runs_share_the_generator_of_who_is_done(accuracy, tmp_path):
  first, *_, last = [
    c for c in accuracy.MATRICES['fashion_mnist'] if c.seed == 1
  ]
  assert 'generator.workdir' not in accuracy.fields(last, tmp_path)
  workdir = tmp_path / first.name
  workdir.mkdir()
  (workdir / 'results.json').write_text('{"wall_s": 1.0}')
  assert accuracy.fields(last, tmp_path)['generator.workdir'] == workdir
  assert 'generator.workdir' not in accuracy.fields(first, tmp_path)
  other = dataclasses.replace(last, placement='integer')
  assert accuracy.fields(other, tmp_path)['generator.workdir'] == workdir
  other = dataclasses.replace(last, seed=2)
  assert 'generator.workdir' not in accuracy.fields(other, tmp_path)


def test_cells_of_a_matrix_differ(accuracy):
  for matrix in accuracy.MATRICES.values():
    assert len({cell.name for cell in matrix}) == len(matrix)


def test_table(accuracy):
  def record(bits, seed, drop, wall_s, own):
    return {
      'config': 'mine',
      'bits': bits,
      'placement': 'paper',
      'seed': seed,
      'evaluated_on': 'images',
      'images': 5000,
      'teacher': 90.0,
      'student': 90 - drop,
      'drop': drop,
      'agreement': 99 - drop,
      'own_generator': own,
      'wall_s': wall_s,
    }

  _, _, *rows = accuracy.table(
    [
      record('W4A4', 1, 2.0, 300.0, True),
      record('W8A8', 0, 0.5, 40.0, False),
      record('W4A4', 0, 1.0, 100.0, True),
    ]
  )
  assert rows == [
    '| `mine.py` | images, 5,000 | W4A4 paper | 90.00 | 89.00, 88.00 '
    '| 1.50 (1.00 to 2.00) | 97.5 | 200 s |',
    '| `mine.py` | images, 5,000 | W8A8 paper | 90.00 | 89.50 '
    '| 0.50 | 98.5 | 40 s (student alone) |',
  ]
