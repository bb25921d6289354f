"""The accuracy benchmark: whose generator a run takes."""

import dataclasses

from benchmarks import accuracy


def test_runs_share_the_generator_of_who_is_done(tmp_path):
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


def test_cells_of_a_matrix_differ():
  for matrix in accuracy.MATRICES.values():
    assert len({cell.name for cell in matrix}) == len(matrix)
