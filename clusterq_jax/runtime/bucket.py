"""Keeps a workdir in a bucket, gs://BUCKET/PATH, through a local copy.

A mode works on the copy. Changed files are uploaded before every checkpoint and
at the end, even if the run fails. A killed run resumes from the contents of the
bucket. Checkpoints are not part of the copy: Orbax writes them to the bucket,
and every process reads them there. A bucket has no locks, so a second run on
the same path goes unnoticed.
"""

import functools
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from clusterq_jax import sharding
from clusterq_jax.errors import InputError
from clusterq_jax.runtime.preemption import Preempted

PREFIX = 'gs://'
# Unfinished files, and files that only this machine needs, are not uploaded.
_LOCAL = ('.tmp', '.lock')


class _Copy:
  """A workdir in a bucket and its local copy.

  Attributes:
    url: URL of the workdir.
    folder: folder of the copy.
  """

  def __init__(self, url: str):
    """Downloads the workdir; only the lead process needs the files.

    Raises:
      InputError: the bucket cannot be read, or gcsfs is missing.
    """
    self.url = url.rstrip('/')
    self._root = self.url.removeprefix(PREFIX)
    self._files = _file_system(url)
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix='clusterq-')).resolve()
    try:
      if sharding.is_lead():
        self._download()
    except Exception as e:  # the network and the service raise many kinds
      self.remove()
      raise InputError(f'{url}: cannot be read ({_reason(e)})') from e
    self._sent = self._present()

  def _download(self) -> None:
    for file in self._files.find(self._root):
      name = file.removeprefix(f'{self._root}/')
      if name.startswith('checkpoints/'):
        continue
      path = self.folder / name
      if not path.resolve().is_relative_to(self.folder):
        raise ValueError(f'{name!r} leads out of the workdir')
      path.parent.mkdir(parents=True, exist_ok=True)
      self._files.get_file(file, str(path))

  def _present(self) -> dict[str, tuple[int, int]]:
    """Returns (mtime in ns, size in bytes) of each file to upload, by name."""
    found = {}
    for path in self.folder.rglob('*'):
      name = path.relative_to(self.folder).as_posix()
      if path.is_file() and not any(part in name for part in _LOCAL):
        stat = path.stat()
        found[name] = stat.st_mtime_ns, stat.st_size
    return found

  def upload(self) -> None:
    """Uploads changed files and removes deleted ones from the bucket.

    Raises:
      InputError: the bucket cannot be written.
    """
    present = self._present()
    changed = [n for n, what in present.items() if self._sent.get(n) != what]
    try:
      for name in changed:
        self._files.put_file(str(self.folder / name), f'{self._root}/{name}')
      for name in self._sent.keys() - present.keys():
        self._files.rm_file(f'{self._root}/{name}')
    except Exception as e:
      raise InputError(
        f'{self.url}: cannot be written ({_reason(e)}); the results so far are '
        f'in {self.folder}'
      ) from e
    self._sent = present

  def remove(self) -> None:
    """Removes the local copy."""
    shutil.rmtree(self.folder)


_copies: dict[pathlib.Path, _Copy] = {}


def _reason(e: Exception) -> str:
  return f'{type(e).__name__}: {str(e).strip()}'.splitlines()[0]


def _file_system(url: str) -> Any:
  try:
    import fsspec  # optional

    return fsspec.filesystem('gs')
  except ImportError as e:
    raise InputError(
      f'{url}: a workdir in a bucket needs the package gcsfs: pip install '
      "'clusterq-jax[gcs]' or pip install gcsfs"
    ) from e


def upload(folder: pathlib.Path) -> None:
  """Uploads the changes in a workdir if it is the copy of a bucket.

  Args:
    folder: the workdir on this machine.

  Raises:
    InputError: the bucket cannot be written.
  """
  if folder in _copies:
    _copies[folder].upload()


def address(path: pathlib.Path) -> str:
  """Returns the URL of a path in a bucket's copy; other paths as they are."""
  for folder, copy in _copies.items():
    if path.is_relative_to(folder):
      return '/'.join((copy.url, *path.relative_to(folder).parts))
  return str(path)


def on_copy(mode: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
  """Decorates a mode so that its workdir can be gs://BUCKET/PATH.

  The decorated mode also raises InputError if the bucket cannot be read or
  written, or if gcsfs is not installed.

  Args:
    mode: function of (config, workdir) that returns results.
  """

  @functools.wraps(mode)
  def call(config, workdir: str) -> dict[str, Any]:
    if not workdir.startswith(PREFIX):
      return mode(config, workdir)
    if not all(workdir.removeprefix(PREFIX).partition('/')):
      raise InputError(f'{workdir}: expected gs://BUCKET/PATH')
    copy = _Copy(workdir)
    _copies[copy.folder] = copy
    try:
      return mode(config, str(copy.folder))
    except (InputError, Preempted) as e:
      raise type(e)(str(e).replace(str(copy.folder), copy.url)) from e
    finally:
      del _copies[copy.folder]
      copy.upload()
      copy.remove()

  return call
