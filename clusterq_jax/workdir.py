"""The folder of a run: whose it is, and its results."""

import json
import pathlib
from typing import Any

import ml_collections

from clusterq_jax import config as config_lib
from clusterq_jax import metrics
from clusterq_jax.errors import InputError


def open_workdir(
  config: ml_collections.ConfigDict, workdir: str
) -> pathlib.Path:
  """Makes the workdir, or refuses one that holds a run of another config.

  Raises:
    InputError: another training config, or a folder that cannot be written.
  """
  folder = pathlib.Path(workdir)
  file = folder / 'config.json'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists():
      changed = config_lib.differences(json.loads(file.read_text()), config)
      if changed:
        raise InputError(
          f'{workdir} holds a run with another config; it differs in '
          f'{"; ".join(changed)}. Choose another workdir, or the same config'
        )
    metrics.write_json(file, config.to_dict())
  except OSError as e:
    raise InputError(f'{workdir}: cannot be written: {e.strerror}') from e
  except json.JSONDecodeError as e:
    raise InputError(f'{file}: not a config: {e}') from e
  return folder


def merge_results(folder: pathlib.Path, new: dict[str, Any]) -> dict[str, Any]:
  """Adds to results.json, or replaces, the keys of `new`, one level deep.

  A figure that is there is not replaced by None, which says not measured.

  Returns:
    All that results.json then holds.
  """
  file = folder / 'results.json'
  results = json.loads(file.read_text()) if file.exists() else {}
  for key, value in new.items():
    old = results.get(key)
    if isinstance(old, dict) and isinstance(value, dict):
      measured = {k: v for k, v in value.items() if v is not None}
      value = {**value, **old, **measured}
    if value is not None or key not in results:
      results[key] = value
  metrics.write_json(file, results)
  return results
