"""Locks the folder of a run and merges its results."""

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
  """Makes the workdir and locks it while the `with` block runs.

  In a distributed run, only the lead touches the folder.

  Args:
    config: resolved config; it is stored in config.json.
    workdir: path of the folder.

  Yields:
    The folder.

  Raises:
    InputError: another run uses the folder, the folder holds a run with another
      training config, or it cannot be written.
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
  """Locks a file until it is closed or the process ends."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    file.seek(0)
    raise InputError(
      f'{workdir}: {file.read().strip()} uses this workdir; wait for it, stop '
      'it, or choose another workdir'
    ) from e
  except OSError:  # a file system without locks
    return
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  file.flush()


def _claim(config: Config, folder: pathlib.Path) -> None:
  """Stores the config; refuses a folder that holds a run with another one."""
  file = folder / 'config.json'
  try:
    if file.exists():
      stored = metrics.read_json(file)
      config_lib.check_schema(stored, str(folder))
      changed = config_lib.differences(stored, config)
      if changed:
        raise InputError(
          f'{folder} holds a run with another config, which differs in '
          f'{"; ".join(changed)}. Choose another workdir or the same config'
        )
    metrics.write_json(file, config_lib.to_json(config))
  except OSError as e:
    raise InputError(f'{folder}: cannot be written: {e.strerror}') from e


def export_folder(config: Config, workdir: str) -> pathlib.Path:
  """Returns the folder that --mode=export writes to."""
  return pathlib.Path(config.export.folder or f'{workdir}/export')


def read_results(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the contents of results.json; {} if there is no file."""
  file = folder / 'results.json'
  return metrics.read_json(file) if file.exists() else {}


# Figures that an evaluation measures on images, by key of results.json. They
# become null when the next evaluation uses other images.
_MEASURED = {
  'teacher': ('top1',),
  'student': ('top1', 'n', 'agreement'),
  'deployed': ('top1', 'n', 'agreement'),
}


def merge_results(folder: pathlib.Path, new: dict[str, Any]) -> dict[str, Any]:
  """Adds new results to results.json, one level deep.

  None means "not measured" and never replaces a figure. If `new` holds figures
  on other images than the file, the figures in the file move to `earlier`.
  Figures next to each other are therefore always on the same images.

  Args:
    folder: the workdir.
    new: results by key.

  Returns:
    The new contents of results.json.
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
  """Moves figures on other images to `earlier`.

  Args:
    results: contents of results.json.
    digest: digest of the images that the next figures are measured on.

  Returns:
    The results; figures on these images return from `earlier`.
  """
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
  """Returns the digest of the images; None in files of older versions."""
  return (figures.get('images') or {}).get('digest')
