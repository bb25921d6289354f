"""The folder of a run: whose it is, and its results."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.config import Config
from clusterq_jax.errors import InputError
from clusterq_jax.runtime import metrics

LOCK = '.lock'


@contextlib.contextmanager
def open_workdir(config: Config, workdir: str) -> Iterator[pathlib.Path]:
  """Makes the workdir, and holds it against other runs.

  Of several processes only the lead touches it.

  Raises:
    InputError: another run is working there, another training config, or a
      folder that cannot be written.
  """
  if '://' in workdir:
    raise InputError(f'{workdir}: expected a folder or gs://BUCKET/PATH')
  folder = pathlib.Path(workdir)
  if not sharding.is_lead():
    yield folder
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open('a+')
  except OSError as e:
    raise InputError(f'{workdir}: cannot be written: {e.strerror}') from e
  with lock:
    _lock(lock, workdir)
    _claim(config, folder)
    yield folder


def _lock(file, workdir: str) -> None:
  """Locks a file for as long as it is open: dies with the process."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    file.seek(0)
    raise InputError(
      f'{workdir}: {file.read().strip()} is working there; wait for it, stop '
      'it, or choose another workdir'
    ) from e
  except OSError:  # a file system without locks
    return
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  file.flush()


def _claim(config: Config, folder: pathlib.Path) -> None:
  """Refuses a folder that holds a run of another config; else stores this."""
  file = folder / 'config.json'
  try:
    if file.exists():
      stored = metrics.read_json(file)
      config_lib.check_schema(stored, str(folder))
      changed = config_lib.differences(stored, config)
      if changed:
        raise InputError(
          f'{folder} holds a run with another config; it differs in '
          f'{"; ".join(changed)}. Choose another workdir, or the same config'
        )
    metrics.write_json(file, config_lib.to_json(config))
  except OSError as e:
    raise InputError(f'{folder}: cannot be written: {e.strerror}') from e


def export_folder(config: Config, workdir: str) -> pathlib.Path:
  """The folder that a run is exported to."""
  return pathlib.Path(config.export.folder or f'{workdir}/export')


def read_results(folder: pathlib.Path) -> dict[str, Any]:
  """What results.json holds; nothing without it."""
  file = folder / 'results.json'
  return metrics.read_json(file) if file.exists() else {}


# What an evaluation measures on images: by key, the figures that become null
# when the next one looks at other images.
_MEASURED = {
  'teacher': ('top1',),
  'student': ('top1', 'n', 'agreement'),
  'deployed': ('top1', 'n', 'agreement'),
}


def merge_results(folder: pathlib.Path, new: dict[str, Any]) -> dict[str, Any]:
  """Adds to results.json, or replaces, the keys of `new`, one level deep.

  A figure that is there is not replaced by None, which says not measured. If
  `new` holds figures on other `images` than the file, those in the file move to
  `earlier`, so that figures side by side are always on the same images.

  Returns:
    All that results.json then holds.
  """
  results = read_results(folder)
  if new.get('images'):
    results = _of_images(results, new['images']['digest'])
  for key, value in new.items():
    old = results.get(key)
    if key != 'by_class' and isinstance(old, dict) and isinstance(value, dict):
      measured = {k: v for k, v in value.items() if v is not None}
      value = {**value, **old, **measured}
    if value is not None or key not in results:
      results[key] = value
  metrics.write_json(folder / 'results.json', results)
  return results


def _of_images(results: dict[str, Any], digest: str) -> dict[str, Any]:
  """The results with figures on the images of that digest alone."""
  shown = _digest(results)
  figures = {
    key: results[key]
    for key in (*_MEASURED, 'by_class')
    if key in results and results[key].get('top1', 0) is not None
  }
  if shown == digest or not figures:
    return results
  earlier = {_digest(entry): entry for entry in results.get('earlier', ())}
  earlier[shown] = {'images': results.get('images'), **figures}
  again = earlier.pop(digest, {})
  cleared = {
    k: v for k, v in results.items() if k not in ('images', 'by_class')
  }
  for key, names in _MEASURED.items():
    if key in cleared:
      cleared[key] = {**cleared[key], **dict.fromkeys(names)}
  return {**cleared, **again, 'earlier': list(earlier.values())}


def _digest(figures: dict[str, Any]) -> str | None:
  """What tells the images of some figures; None in files of before."""
  return (figures.get('images') or {}).get('digest')
