"""A workdir in a bucket: what is downloaded and uploaded, and in what order.

A folder stands for the service.
"""

import pathlib

import jax
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from clusterq_jax.errors import InputError
from clusterq_jax.runtime import bucket

_URL = 'gs://bucket/runs/a'


@pytest.fixture
def files(tmp_path, monkeypatch):
  """The service, with an empty bucket."""
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
  """The workdir in the bucket."""
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
  """Calls body(folder) as a mode is called."""
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


def test_checkpoints_cut_short(run):
  """They are neither used nor left there."""
  mark = 'checkpoints__{}___CHECKPOINT_METADATA'
  _write(run, **{mark.format(1): '', 'checkpoints__1__state__d': '1'})
  _write(run, checkpoints__2__state__d='2')

  def body(folder):
    assert {path.name for path in (folder / 'checkpoints').iterdir()} == {'1'}
    assert len(_names(folder)) == 2

  _on_copy(body)
  assert {path.name for path in (run / 'checkpoints').iterdir() if _names(path)}
  assert not _names(run / 'checkpoints' / '2')


def test_an_upload_cut_short(files, run, monkeypatch, tmp_path):
  """What says that a checkpoint is whole comes last."""
  put, calls = files.put_file, []

  def failing(*args):
    calls.append(args)
    if len(calls) > 1:
      raise OSError('no network')
    put(*args)

  monkeypatch.setattr(files, 'put_file', failing)

  def body(folder):
    _write(
      folder, checkpoints__1___CHECKPOINT_METADATA='', checkpoints__1__d='1'
    )

  with pytest.raises(InputError, match='cannot be written') as error:
    _on_copy(body)
  assert 'no network' in str(error.value)
  assert str(tmp_path / 'copy') in str(error.value)
  assert _names(run) == {'checkpoints/1/d'}
  assert len(_names(tmp_path / 'copy')) == 2


def test_names_that_lead_elsewhere(files, monkeypatch, tmp_path):
  monkeypatch.setattr(files, 'find', lambda root: [f'{root}/../../../x'])
  with pytest.raises(InputError, match='leads out of the workdir'):
    _on_copy(None)
  assert not (tmp_path / 'copy').exists()


def test_several_processes(files, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(InputError, match='gcsfuse'):
    _on_copy(None)
