"""Reads torch checkpoints without running code from them.

Needs the optional package torch, 2.6 or newer. Refuses pickles that need more
than tensors, and TorchScript programs.
"""

import collections
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

from clusterq_jax.errors import InputError, check_archive
from clusterq_jax.weights.entries import Entry, join_names, refuse_contents

_DEPTH = 8  # levels of nested dictionaries that are searched


def read(path: str, head: bytes) -> list[Entry]:
  """Reads every dictionary of tensors in a torch checkpoint.

  Args:
    path: path of the file.
    head: the first bytes of the file.

  Raises:
    InputError: torch is missing or older than 2.6, or the file is damaged, of
      another format, or would run code.
  """
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f'{path}: torch is not installed and reads this format: pip install '
      f'torch, or give a .safetensors file'
    ) from error
  # Before 2.6, weights_only could be made to run code (CVE-2025-32434).
  if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
    raise InputError(
      f'{path}: torch {torch.__version__} cannot open it safely, expected '
      f'2.6 or newer: pip install --upgrade torch'
    )
  try:
    _check_pickle(path, head)
    # An open file, because torch chooses a reader by the suffix of a path.
    with warnings.catch_warnings(), open(path, 'rb') as file:
      warnings.simplefilter('ignore')
      data = torch.load(file, map_location='cpu', weights_only=True)
  except InputError:
    raise
  except Exception as error:  # damaged contents raise nearly every kind
    called = re.findall(r'GLOBAL (\S+)', str(error))[:1] or _calls(path, head)
    if called:
      raise InputError(
        f'{path}: refused, nothing was run: opening this pickle would run '
        f'{join_names(called)}, expected tensors only, as saved by '
        f'torch.save(model.state_dict(), path)'
      ) from error
    if 'TorchScript' in str(error):
      raise InputError(
        f'{path}: found a TorchScript program, expected a state dict'
      ) from error
    refuse_contents(path, head, 'a torch checkpoint', error)
  if not isinstance(data, Mapping):
    kind = type(data).__name__
    raise InputError(f'{path}: found a {kind}, expected a dict of tensors')
  return _find_entries(path, data)


def _find_entries(path: str, data: Mapping[Any, Any]) -> list[Entry]:
  """Finds every dictionary in `data` that holds tensors under string keys."""
  import torch

  found = []
  seen = {id(data)}  # a pickled dictionary can contain itself
  queue: collections.deque[tuple[tuple[str, ...], Mapping]] = collections.deque(
    [((), data)]
  )
  while queue:
    keys, group = queue.popleft()
    values, foreign = {}, []
    for key, value in group.items():
      if isinstance(value, Mapping):
        if id(value) not in seen and len(keys) < _DEPTH:
          seen.add(id(value))
          queue.append(((*keys, str(key)), value))
      elif (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and not value.is_nested  # a nested tensor has no shape
      ):
        values[key] = value
      else:
        foreign.append(f'{key} ({type(value).__name__})')
    if values:
      found.append(Entry(path, '.'.join(keys), values, tuple(foreign)))
  return found


def _check_pickle(path: str, head: bytes) -> None:
  """Refuses zip bombs and bytearrays, which torch would expand in memory."""
  if head.startswith(b'PK'):
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
      parts = [n for n in archive.namelist() if n.endswith('data.pkl')]
      pickled = b''.join(map(archive.read, parts))
  else:
    with open(path, 'rb') as file:
      pickled = file.read()
  if b'bytearray\n' in pickled:
    raise InputError(f'{path}: found a bytearray, expected tensors only')


def _calls(path: str, head: bytes) -> list[str]:
  """Names what a bare pickle imports, by parsing it without executing it."""
  found: list[str] = []
  strings: list[str] = []
  if not head.startswith(b'\x80'):
    return found
  try:
    with open(path, 'rb') as file:
      for code, argument, _ in pickletools.genops(file):
        if code.name == 'GLOBAL':
          found.append(str(argument).replace(' ', '.'))
        elif code.name == 'STACK_GLOBAL':
          found.append('.'.join(strings[-2:]))
        elif isinstance(argument, str):
          strings.append(argument)
  except Exception:
    pass  # the pickle is damaged; names found before the damage are kept
  return list(dict.fromkeys(found))
