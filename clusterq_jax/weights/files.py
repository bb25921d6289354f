"""Reads weight files into dictionaries of numpy arrays; writes safetensors.

Reads safetensors, npz and torch checkpoints, and never runs code from a file.
The first bytes of a file decide which reader takes it. If they do not tell, the
suffix of its name decides. Every fault of a file raises an `InputError`.

This module does not know what the tensors mean. `layouts` does.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from clusterq_jax.atomic import atomic
from clusterq_jax.errors import InputError, check_archive
from clusterq_jax.weights import torch_files
from clusterq_jax.weights.entries import Entry, refuse_contents, shared_prefix

_TORCH_SUFFIXES = ('.th', '.pt', '.pth', '.tar', '.ckpt', '.bin')
_EXPECTED = 'expected .safetensors, .npz, .th, .pt, .pth, .tar, .ckpt or .bin'
_LARGEST_HEADER = 2**27  # bytes of a safetensors header
_FLOATS = ('F16', 'BF16', 'F32', 'F64')


def read_entries(
  path: str | os.PathLike[str],
) -> tuple[list[Entry], dict[str, str]]:
  """Reads a file and finds every dictionary of tensors in it.

  Args:
    path: a safetensors or npz file, which holds one dictionary, or a torch
      checkpoint.

  Returns:
    The entries, at least one, in the file's order, and the metadata of a
    safetensors header, which are empty for other formats.

  Raises:
    InputError: the file is missing, empty, damaged, of another format, or
      would run code when opened.
  """
  path = os.fspath(path)
  try:
    with open(path, 'rb') as file:
      head = file.read(64)
  except OSError as error:
    raise InputError(
      f'{path}: cannot be read: {error.strerror}; {_EXPECTED}'
    ) from error
  kind = _kind(path, head)
  if not head:
    raise InputError(f'{path}: an empty file (0 bytes), expected tensors')
  metadata: dict[str, str] = {}
  if kind == 'safetensors':
    tensors, metadata = _read_safetensors(path, head)
    entries = [Entry(path, '', tensors)]
  elif kind == 'npz':
    entries = [Entry(path, '', _read_npz(path))]
  else:
    entries = torch_files.read(path, head)
  if not any(entry.values for entry in entries):
    raise InputError(f'{path}: holds no tensors')
  return entries, metadata


def read_tensors(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads every tensor of a file with one dictionary of tensors.

  Removes prefixes that all keys share: 'module.', '_orig_mod.'.

  Args:
    path: a file that `read_entries` takes. If it holds several entries, the
      first is read.

  Returns:
    The tensors by name, in the file's shapes, and the metadata of
    `read_entries`. Floats become float32; other types stay as they are.

  Raises:
    InputError: see `read_entries` and `Entry.read`.
  """
  entries, metadata = read_entries(path)
  tensors = entries[0].read()
  while prefix := shared_prefix(tensors):
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
  return tensors, metadata


def write_safetensors(
  path: str | os.PathLike[str],
  variables: Mapping[str, Any],
  metadata: dict[str, str],
) -> None:
  """Writes a nested dictionary of arrays atomically, keys joined with '/'.

  Args:
    path: the file to write or to replace.
    variables: nested dictionaries of arrays of any shape.
    metadata: strings for the header of the file.

  Raises:
    InputError: the folder does not exist or cannot be written to.
    ValueError: a key contains '/'.
  """
  payload = _sort_header(
    safetensors.numpy.save(dict(_flatten(variables)), metadata)
  )
  try:
    with atomic(path) as temporary:
      temporary.write_bytes(payload)
  except OSError as error:
    raise InputError(f'{path}: cannot be written: {error.strerror}') from error


def unflatten(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Turns 'a/b' keys into nested dictionaries, as `write_safetensors` got them.

  Raises:
    InputError: a name stands for a tensor and for a group of tensors.
  """
  tree: dict[str, Any] = {}
  for key, value in tensors.items():
    *groups, leaf = key.split('/')
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
      if not isinstance(node, dict):
        raise InputError(f'{key} lies below a tensor of that name')
    if leaf in node:
      raise InputError(f'{key} is both a tensor and a group')
    node[leaf] = value
  return tree


def _kind(path: str, head: bytes) -> str:
  """Returns 'safetensors', 'npz' or 'torch': by content, else by name."""
  suffix = os.path.splitext(path)[1].lower()
  size = int.from_bytes(head[:8], 'little')
  if head[8:9] == b'{' and 0 < size < _LARGEST_HEADER:
    return 'safetensors'
  if head.startswith(b'PK'):
    members = _members(path)
    if any(name.endswith('data.pkl') for name in members):
      return 'torch'
    if members and all(name.endswith('.npy') for name in members):
      return 'npz'
  if suffix in ('.safetensors', '.npz'):
    return suffix[1:]
  if suffix not in _TORCH_SUFFIXES:
    found = f'extension {suffix!r}' if suffix else 'no extension'
    raise InputError(f'{path}: {found}, {_EXPECTED}')
  return 'torch'


def _members(path: str) -> list[str]:
  """Returns the names in a zip archive, or none if it is damaged."""
  try:
    with zipfile.ZipFile(path) as archive:
      return archive.namelist()
  except Exception:  # the reader of the format reports the damage
    return []


def _read_safetensors(
  path: str, head: bytes
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  tensors = {}
  try:
    with safetensors.safe_open(path, framework='np') as file:
      metadata = dict(file.metadata() or {})
      for key in file.keys():
        kind = file.get_slice(key).get_dtype()
        try:
          value = file.get_tensor(key)
        except (AttributeError, TypeError) as error:
          raise InputError(
            f'{path}: tensor {key} has type {kind}, expected a '
            'float of 16 bits or more'
          ) from error
        tensors[key] = _float32(value) if kind in _FLOATS else value
  except safetensors.SafetensorError as error:
    if head[8:9] == b'{':
      size = os.path.getsize(path)
      raise InputError(
        f'{path}: found a truncated or damaged safetensors file ({size:,} '
        f'bytes), expected a complete one'
      ) from error
    refuse_contents(path, head, 'a safetensors file', error)
  return tensors, metadata


def _read_npz(path: str) -> dict[str, np.ndarray]:
  try:
    check_archive(path)
    with np.load(path, allow_pickle=False) as file:
      tensors = {key: file[key] for key in file.files}
  except InputError:
    raise
  except Exception as error:  # numpy and zipfile raise a dozen kinds
    reason = ' '.join(str(error).split())
    raise InputError(
      f'{path}: cannot be read as an .npz of arrays ({reason})'
    ) from error
  for key, value in tensors.items():
    if value.dtype.kind == 'f':
      tensors[key] = _float32(value)
    elif value.dtype.kind not in 'biu':
      raise InputError(
        f'{path}: tensor {key} has type {value.dtype}, expected a float'
      )
  return tensors


def _float32(value: np.ndarray) -> np.ndarray:
  # What overflows becomes infinite here and is refused by `Entry.read`.
  with np.errstate(over='ignore', invalid='ignore'):
    return np.asarray(value).astype(np.float32)


def _flatten(tree: Mapping[str, Any], prefix: str = ''):
  for key, value in tree.items():
    if '/' in key:
      raise ValueError(f'key {key!r} contains the separator "/"')
    if isinstance(value, Mapping):
      yield from _flatten(value, f'{prefix}{key}/')
    else:
      # safetensors writes the buffer in memory order and ignores strides.
      yield prefix + key, np.array(value, order='C')


def _sort_header(payload: bytes) -> bytes:
  """Sorts the header: safetensors writes metadata in a random order."""
  size = int.from_bytes(payload[:8], 'little')
  header = json.loads(payload[8 : 8 + size])
  text = json.dumps(header, sort_keys=True, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text + payload[8 + size :]
