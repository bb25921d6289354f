"""Tests which files of a workdir in a bucket are downloaded and uploaded.

A folder replaces the cloud service.
"""

import pathlib

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from clusterq_jax.errors import InputError
from clusterq_jax.runtime import bucket

_URL = 'gs://bucket/runs/a'


@pytest.fixture
def files(tmp_path, monkeypatch):
  """Returns the file system, with an empty bucket."""
  cloud = tmp_path / 'cloud'
  (cloud / 'bucket').mkdir(parents=True)
  files = DirFileSystem(str(cloud), LocalFileSystem(auto_mkdir=True))
  monkeypatch.setattr(bucket, '_file_system', lambda url: files)
  monkeypatch.setattr(
    bucket.tempfile, 'mkdtemp', lambda prefix: _made(tmp_path / 'copy')
  )
  return files


def _made(folder):
  folder.mkdir()
  return str(folder)


@pytest.fixture
def run(files, tmp_path):
  """Returns the workdir in the bucket."""
  return tmp_path / 'cloud' / 'bucket' / 'runs' / 'a'


def _write(folder, **contents):
  for name, text in contents.items():
    path = folder / name.replace('__', '/')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _names(folder):
  paths = (path for path in folder.rglob('*') if path.is_file())
  return {path.relative_to(folder).as_posix() for path in paths}


def _on_copy(body, url=_URL):
  """Calls body(folder) as a mode."""
  bucket.on_copy(lambda config, workdir: body(pathlib.Path(workdir)))(None, url)


def test_what_changes_is_uploaded(run, tmp_path):
  _write(run, kept='1', changed='2', removed='3')
  before = (run / 'kept').stat().st_mtime_ns

  def body(folder):
    assert _names(folder) == {'kept', 'changed', 'removed'}
    _write(folder, changed='22', new__file='4')
    (folder / '.lock').write_text('')
    (folder / 'removed').unlink()
    bucket.upload(folder)
    assert _names(run) == {'kept', 'changed', 'new/file'}
    assert (run / 'changed').read_text() == '22'
    _write(folder, last='5')
    assert bucket.address(folder / 'export') == f'{_URL}/export'
    assert bucket.address(folder) == _URL

  _on_copy(body)
  assert _names(run) == {'kept', 'changed', 'new/file', 'last'}
  assert (run / 'kept').stat().st_mtime_ns == before
  assert not (tmp_path / 'copy').exists()


def test_a_run_that_fails(run):
  def body(folder):
    _write(folder, results='1')
    raise InputError(f'{folder}/x: no')

  with pytest.raises(InputError, match=f'^{_URL}/x: no$'):
    _on_copy(body)
  assert _names(run) == {'results'}


def test_checkpoints(run):
  """Checkpoints are neither downloaded nor uploaded."""
  _write(run, checkpoints__1__state__d='1', kept='2')

  def body(folder):
    assert _names(folder) == {'kept'}

  _on_copy(body)
  assert _names(run) == {'checkpoints/1/state/d', 'kept'}


def test_an_upload_cut_short(files, run, monkeypatch, tmp_path):
  put, calls = files.put_file, []

  def failing(*args):
    calls.append(args)
    if len(calls) > 1:
      raise OSError('no network')
    put(*args)

  monkeypatch.setattr(files, 'put_file', failing)

  def body(folder):
    _write(folder, a='1', b='2')

  with pytest.raises(InputError, match='cannot be written') as error:
    _on_copy(body)
  assert 'no network' in str(error.value)
  assert str(tmp_path / 'copy') in str(error.value)
  assert len(_names(run)) == 1
  assert len(_names(tmp_path / 'copy')) == 2


def test_names_that_lead_elsewhere(files, monkeypatch, tmp_path):
  monkeypatch.setattr(files, 'find', lambda root: [f'{root}/../../../x'])
  with pytest.raises(InputError, match='leads out of the workdir'):
    _on_copy(None)
  assert not (tmp_path / 'copy').exists()


def test_all_but_the_lead(run, monkeypatch):
  monkeypatch.setattr(bucket.sharding, 'is_lead', lambda: False)
  _write(run, kept='1')

  def body(folder):
    assert not _names(folder)
    assert bucket.address(folder / 'checkpoints') == f'{_URL}/checkpoints'

  _on_copy(body)
  assert _names(run) == {'kept'}
