"""Dictionaries of tensors as weight files hold them."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from clusterq_jax.errors import InputError, check_size

# The first bytes of a file and what they mean, for error messages.
_MAGIC = (
  (b'PK', 'a damaged or truncated zip archive, or a zip of something else'),
  (b'\x80', 'a damaged, truncated or unknown pickle'),
  (b'version https://git-lfs', 'a Git LFS pointer, not the file itself'),
  (b'<', 'a web page or XML'),
  (b'\x89HDF', 'an HDF5 file'),
  (b'\x93NUMPY', 'a numpy array'),
)


def join_names(names: Iterable[str], limit: int = 5) -> str:
  """Joins the first names, with '...' if there are more than `limit`."""
  names = list(names)
  return ', '.join(names[:limit] + ['...'] * (len(names) > limit))


def shared_prefix(keys: Iterable[str]) -> str:
  """Returns the first part of the keys, 'module.', if all begin with it."""
  first = {key.partition('.')[0] for key in keys if '.' in key}
  if len(first) != 1 or not all('.' in key for key in keys):
    return ''
  return f'{first.pop()}.'


@dataclasses.dataclass(frozen=True)
class Entry:
  """One dictionary of tensors in a file. A checkpoint can hold several.

  Attributes:
    path: path of the file.
    name: the keys that lead to the dictionary, joined with '.'; '' is the top
      level of the file.
    values: numpy or torch arrays by key.
    foreign: descriptions, 'key (type)', of the values that are no tensors.
  """

  path: str
  name: str
  values: Mapping[str, Any]
  foreign: tuple[str, ...] = ()

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor, without step counters."""
    return {
      key: tuple(value.shape)
      for key, value in self.values.items()
      if not _is_counter(key, value)
    }

  def read(self) -> dict[str, np.ndarray]:
    """Returns the tensors, floats as float32, without step counters.

    Raises:
      InputError: the entry holds something that is not a dense, finite tensor.
    """
    if self.foreign:
      raise InputError(
        f'{self.path}: {len(self.foreign)} entries are not tensors '
        f'({join_names(self.foreign)}), expected a state dict'
      )
    # A torch view can repeat the few numbers of its storage without bound.
    sizes = [int(np.prod(v.shape, dtype=object)) for v in self.values.values()]
    check_size(self.path, 4 * sum(sizes))
    tensors = {}
    for key, value in self.values.items():
      if _is_counter(key, value):
        continue
      if not isinstance(value, np.ndarray):
        value = _from_torch(self.path, key, value)
      bad = int(np.size(value) - np.isfinite(value).sum())
      if bad:
        raise InputError(
          f'{self.path}: tensor {key} has {bad} NaN or infinite '
          f'value(s) of {value.size} in float32, expected finite numbers'
        )
      tensors[key] = value
    return tensors


def _is_counter(key: str, value: Any) -> bool:
  """Tells BatchNorm's batch counters and other integer scalars."""
  if isinstance(value, np.ndarray):
    is_integer = value.dtype.kind in 'biu'
  else:
    is_integer = not value.is_floating_point()
  return key.endswith('num_batches_tracked') or (is_integer and not value.shape)


def _from_torch(path: str, key: str, value: Any) -> np.ndarray:
  """Converts a torch tensor; it becomes float32 if it holds floats."""
  try:
    value = value.float() if value.is_floating_point() else value
    return value.detach().numpy()
  except (RuntimeError, TypeError, NotImplementedError) as error:
    raise InputError(
      f'{path}: tensor {key} is {value.dtype}, {value.layout}, '
      f'expected a dense float tensor'
    ) from error


def refuse_contents(
  path: str, head: bytes, wanted: str, error: Exception
) -> NoReturn:
  """Raises an error that describes a file by its first bytes.

  Args:
    path: path of the file.
    head: the first bytes of the file.
    wanted: the contents that were expected.
    error: the cause.

  Raises:
    InputError: always.
  """
  found = next(
    (text for magic, text in _MAGIC if head.startswith(magic)),
    f'contents that start with {head[:8]!r}',
  )
  size = os.path.getsize(path)
  raise InputError(
    f'{path}: found {found} ({size:,} bytes), expected {wanted}'
  ) from error
