"""Weight files as dictionaries of numpy arrays, read without running them.

Reads safetensors and npz files, and torch checkpoints with
`torch.load(weights_only=True)`; torch is optional and needed for those alone.
A file's first bytes tell which of the three it is; where they do not, its name
does. Writes `.safetensors`. Every fault of a file ends in an `InputError`.

Left out: pickles that need more than tensors, TorchScript, and any knowledge of
what the tensors mean, which is `layouts`' part.
"""

import collections
import dataclasses
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.numpy

from clusterq_jax.atomic import atomic
from clusterq_jax.errors import InputError, check_archive, check_size

_TORCH_SUFFIXES = ('.th', '.pt', '.pth', '.tar', '.ckpt', '.bin')
_EXPECTED = 'expected .safetensors, .npz, .th, .pt, .pth, .tar, .ckpt or .bin'
_DEPTH = 8  # of dictionaries within dictionaries
_LARGEST_HEADER = 2**27  # bytes, of a safetensors file
_FLOATS = ('F16', 'BF16', 'F32', 'F64')
_MAGIC = (
  (b'PK', 'a damaged or truncated zip archive, or a zip of something else'),
  (b'\x80', 'a damaged, truncated or unknown pickle'),
  (b'version https://git-lfs', 'a Git LFS pointer, not the file itself'),
  (b'<', 'a web page or XML'),
  (b'\x89HDF', 'an HDF5 file'),
  (b'\x93NUMPY', 'a numpy array'),
)


def names(entries: Iterable[str], limit: int = 5) -> str:
  """Joins at most `limit` entries; escapes what would break the line."""
  entries = list(entries)
  shown = [str(e).encode('unicode_escape').decode() for e in entries[:limit]]
  return ', '.join(shown + ['...'] * (len(entries) > limit))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One dictionary of tensors in a file; a checkpoint may hold several.

  Attributes:
    path: of the file.
    name: the keys that lead to it, joined with '.'; '' is the file itself.
    values: its tensors by key, as numpy or torch arrays.
    foreign: what else it holds, 'key (type)'.
  """

  path: str
  name: str
  values: Mapping[str, Any]
  foreign: tuple[str, ...] = ()

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor; counters, which count steps, are left out."""
    return {
      key: tuple(value.shape)
      for key, value in self.values.items()
      if not _is_counter(key, value)
    }

  def read(self) -> dict[str, np.ndarray]:
    """The tensors: floating-point ones as float32, counters left out.

    Raises:
      InputError: it holds something that is not a dense, finite tensor.
    """
    tensors = {}
    if self.foreign:
      raise InputError(
        f'{self.path}: {len(self.foreign)} entries are not tensors '
        f'({names(self.foreign)}), expected a state dict'
      )
    # A view can repeat the few numbers of its storage any number of times.
    sizes = [int(np.prod(v.shape, dtype=object)) for v in self.values.values()]
    check_size(self.path, sum(4 * size for size in sizes))
    for key, value in self.values.items():
      if _is_counter(key, value):
        continue
      if not isinstance(value, np.ndarray):
        value = _from_torch(self.path, key, value)
      bad = int(np.size(value) - np.isfinite(value).sum())
      if bad:
        raise InputError(
          f'{self.path}: tensor {names([key])} has {bad} NaN or infinite '
          f'value(s) of {value.size} in float32, expected finite numbers'
        )
      tensors[key] = value
    return tensors


def _is_counter(key: str, value: Any) -> bool:
  """Batches of BatchNorm, and steps of averaged models: whole scalars."""
  whole = isinstance(value, np.ndarray) and value.dtype.kind in 'biu'
  if not isinstance(value, np.ndarray):
    whole = not value.is_floating_point()
  return key.endswith('num_batches_tracked') or (
    whole and len(value.shape) == 0
  )


def shared_prefix(keys: Iterable[str]) -> str:
  """The first part of the keys, 'module.', if they all begin with it."""
  first = {key.partition('.')[0] for key in keys if '.' in key}
  if len(first) != 1 or not all('.' in key for key in keys):
    return ''
  return f'{first.pop()}.'


def read_entries(
  path: str | os.PathLike[str],
) -> tuple[list[Entry], dict[str, str]]:
  """Reads a file and finds every dictionary of tensors in it.

  Args:
    path: a safetensors or npz file, which hold one, or a torch checkpoint.

  Returns:
    The entries, at least one, in the file's order. And the metadata of a
    safetensors header, empty for the other formats.

  Raises:
    InputError: the file is missing, empty, damaged, of another format, or
      would run code when opened.
  """
  path = os.fspath(path)
  if os.path.isdir(path):
    raise InputError(f'{path}: a directory, {_EXPECTED}')
  if not os.path.exists(path):
    raise InputError(f'{path}: no such file, {_EXPECTED}')
  try:
    with open(path, 'rb') as file:
      head = file.read(64)
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from error
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
    entries = _read_torch(path, head)
  if not any(entry.values for entry in entries):
    raise InputError(f'{path}: holds no tensors')
  return entries, metadata


def _kind(path: str, head: bytes) -> str:
  """'safetensors', 'npz' or 'torch': by content, else by name."""
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
  """The names in a zip archive; none where it is damaged."""
  try:
    with zipfile.ZipFile(path) as archive:
      return archive.namelist()
  except Exception:  # of a damaged one; the reader of the format says why
    return []


def read_tensors(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads every tensor of a file with one dictionary of tensors.

  The prefix that all keys share is removed: 'module.', '_orig_mod.'.

  Args:
    path: as in `read_entries`; of several entries the first is read.

  Returns:
    The tensors by name, in the file's shapes: floating-point ones as float32,
    the others in their own type. And the metadata, see `read_entries`.

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
  """Writes a nested dictionary of arrays, keys joined with '/', atomically.

  Args:
    path: where to; a file already there is replaced once all is written.
    variables: nested dictionaries of arrays of any shape.
    metadata: strings for the header of the file.

  Raises:
    InputError: the folder does not exist or cannot be written to.
    ValueError: a key contains '/'.
  """
  path = os.fspath(path)
  payload = _sort_header(
    safetensors.numpy.save(dict(_flatten(variables)), metadata)
  )
  try:
    with atomic(path) as temporary:
      temporary.write_bytes(payload)
  except OSError as error:
    raise InputError(f'{path}: cannot be written: {error.strerror}') from error


def unflatten(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Turns 'a/b' keys into nested dictionaries: `write_safetensors` undone.

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
        raise InputError(f'{names([key])} lies below a tensor of that name')
    if leaf in node:
      raise InputError(f'{names([key])} is both a tensor and a group')
    node[leaf] = value
  return tree


def _sort_header(payload: bytes) -> bytes:
  """The same file for the same contents: metadata come in random order."""
  size = int.from_bytes(payload[:8], 'little')
  header = json.loads(payload[8 : 8 + size])
  text = json.dumps(header, sort_keys=True, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text + payload[8 + size :]


def _flatten(tree: Mapping[str, Any], prefix: str = ''):
  for key, value in tree.items():
    if '/' in key:
      raise ValueError(f'key {key!r} contains the separator "/"')
    if isinstance(value, Mapping):
      yield from _flatten(value, f'{prefix}{key}/')
    else:
      # safetensors writes the buffer as it lies, whatever the strides say.
      yield prefix + key, np.array(value, order='C')


def _float32(value: np.ndarray) -> np.ndarray:
  with np.errstate(over='ignore', invalid='ignore'):
    return np.asarray(value).astype(np.float32)


def _foreign(path: str, head: bytes, wanted: str, error: Exception) -> NoReturn:
  found = next(
    (text for magic, text in _MAGIC if head.startswith(magic)),
    f'contents that start with {head[:8]!r}',
  )
  size = os.path.getsize(path)
  raise InputError(
    f'{path}: found {found} ({size:,} bytes), expected {wanted}'
  ) from error


def _read_safetensors(path: str, head: bytes):
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
            f'{path}: tensor {names([key])} has type {kind}, expected a float '
            f'of 16 bits or more'
          ) from error
        tensors[key] = _float32(value) if kind in _FLOATS else value
  except safetensors.SafetensorError as error:
    if head[8:9] == b'{':
      size = os.path.getsize(path)
      raise InputError(
        f'{path}: found a truncated or damaged safetensors file ({size:,} '
        f'bytes), expected a complete one'
      ) from error
    _foreign(path, head, 'a safetensors file', error)
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
    if value.dtype.kind not in 'biuf':
      raise InputError(
        f'{path}: tensor {names([key])} has type {value.dtype}, expected a '
        'float'
      )
  return {
    k: _float32(v) if v.dtype.kind == 'f' else v for k, v in tensors.items()
  }


def _read_torch(path: str, head: bytes) -> list[Entry]:
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f'{path}: torch is not installed and reads this format: pip install '
      f'torch, or give a .safetensors file'
    ) from error
  # Before 2.6 weights_only could be made to run code (CVE-2025-32434).
  if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
    raise InputError(
      f'{path}: torch {torch.__version__} cannot open it safely, expected '
      f'2.6 or newer: pip install --upgrade torch'
    )
  try:
    _check_pickle(path, head)
    # A file, not its name: torch goes by the suffix of a name.
    with warnings.catch_warnings(), open(path, 'rb') as file:
      warnings.simplefilter('ignore')
      data = torch.load(file, map_location='cpu', weights_only=True)
  except InputError:
    raise
  except Exception as error:  # Damaged contents raise nearly anything.
    called = re.findall(r'GLOBAL (\S+)', str(error))[:1] or _calls(path, head)
    if called:
      raise InputError(
        f'{path}: refused, nothing was run: opening this pickle would run '
        f'{names(called)}, expected tensors only, as saved by '
        f'torch.save(model.state_dict(), path)'
      ) from error
    if 'TorchScript' in str(error):
      raise InputError(
        f'{path}: found a TorchScript program, expected a state dict'
      ) from error
    _foreign(path, head, 'a torch checkpoint', error)
  if not isinstance(data, Mapping):
    kind = type(data).__name__
    raise InputError(f'{path}: found a {kind}, expected a dict of tensors')
  return _entries(path, data)


def _entries(path: str, data: Mapping[Any, Any]) -> list[Entry]:
  """Every dictionary in `data` with tensors under names."""
  import torch

  found = []
  seen = {id(data)}  # a pickle can hold itself
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
        and not value.is_nested  # several tensors in one, without a shape
      ):
        values[key] = value
      else:
        foreign.append(f'{key} ({type(value).__name__})')
    if values:
      found.append(Entry(path, '.'.join(keys), values, tuple(foreign)))
  return found


def _from_torch(path: str, key: str, value: Any) -> np.ndarray:
  import torch

  try:
    if value.is_floating_point():
      value = value.to(torch.float32)
    return value.detach().numpy()
  except (RuntimeError, TypeError, NotImplementedError) as error:
    raise InputError(
      f'{path}: tensor {names([key])} is {value.dtype}, {value.layout}, '
      f'expected a dense float tensor'
    ) from error


def _check_pickle(path: str, head: bytes) -> None:
  """Refuses what torch would open but no tensor needs, and fills the memory."""
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
  """Names what a bare pickle imports, from a parse that executes nothing."""
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
    # A damaged pickle: what was found before the damage is all there is.
    pass
  return list(dict.fromkeys(found))
