"""Files are replaced as a whole or not at all."""

import os

import pytest

from clusterq_jax.atomic import atomic


@pytest.fixture
def target(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('old')
  return path


def test_a_file_is_replaced_when_the_block_ends(target):
  with atomic(str(target)) as temporary:
    assert temporary.parent == target.parent
    temporary.write_text('new')
    assert target.read_text() == 'old'
  assert target.read_text() == 'new'
  assert os.listdir(target.parent) == ['a.txt']


def test_a_file_is_created(tmp_path):
  with atomic(tmp_path / 'new.txt') as temporary:
    temporary.write_text('new')
  assert (tmp_path / 'new.txt').read_text() == 'new'


def _fail(target, written, error):
  with atomic(target) as temporary:
    if written:
      temporary.write_text(written)
    raise error


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('written', ['', 'half'])
def test_an_error_leaves_the_old_file_and_nothing_else(target, error, written):
  with pytest.raises(error):
    _fail(target, written, error)
  assert target.read_text() == 'old'
  assert os.listdir(target.parent) == ['a.txt']


def test_a_full_disk_leaves_the_old_file(target, monkeypatch):
  def no_space(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', no_space)
  with pytest.raises(OSError, match='No space'), atomic(target) as temporary:
    temporary.write_text('new')
  assert target.read_text() == 'old'
  assert os.listdir(target.parent) == ['a.txt']


def test_the_error_of_the_block_is_not_hidden(target):
  # Removing the temporary file fails here: its folder is a file.
  with (
    pytest.raises(RuntimeError, match='the cause'),
    atomic(target / 'b.txt'),
  ):
    raise RuntimeError('the cause')
  assert target.read_text() == 'old'


def test_the_folder_must_exist(tmp_path):
  path = tmp_path / 'absent' / 'a.txt'
  with pytest.raises(FileNotFoundError), atomic(path) as temporary:
    temporary.write_text('new')
