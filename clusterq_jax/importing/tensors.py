"""Tensors in the files of torch: raw storages, and pickles of torch.save.

A pickle is a program. This one is first checked to hold only the instructions
that build tensors, and then may name nothing but them. Nothing is executed.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

# torch's types by number in JSON and by the name of a storage's class.
_TYPES = {
  1: ('ByteStorage', np.uint8),
  2: ('CharStorage', np.int8),
  3: ('ShortStorage', np.int16),
  4: ('IntStorage', np.int32),
  5: ('LongStorage', np.int64),
  6: ('HalfStorage', np.float16),
  7: ('FloatStorage', np.float32),
  8: ('DoubleStorage', np.float64),
  12: ('BoolStorage', np.bool_),
  13: ('BFloat16Storage', ml_dtypes.bfloat16),
}
DTYPES = {number: np.dtype(kind) for number, (_, kind) in _TYPES.items()}
_STORAGES = {name: np.dtype(kind) for name, kind in _TYPES.values()}
_MOST_COPIES = 4  # size of all tensors, in sizes of the storages
# Instructions in a pickle of tensors. Others could take memory without bound.
_INSTRUCTIONS = frozenset(
  'PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID BINGET LONG_BINGET BINPUT '
  'LONG_BINPUT BINUNICODE BININT BININT1 BININT2 LONG1 NONE NEWTRUE NEWFALSE '
  'EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM '
  'SETITEMS APPEND APPENDS'.split()
)


def strided(
  key: str,
  raw: bytes,
  dtype: np.dtype,
  shape: Sequence[int],
  strides: Sequence[int],
  offset: int,
) -> np.ndarray:
  """Copies a tensor out of its storage; floats become float32.

  Args:
    key: name of the tensor, for messages.
    raw: the storage, little-endian.
    dtype: type of a number in the storage.
    shape: shape of the tensor.
    strides: distance between neighbours along each axis, in numbers.
    offset: place of the first number.

  Raises:
    ValueError: the tensor reaches beyond its storage, or repeats numbers.
  """
  numbers = [*shape, *strides, offset]
  if not all(type(n) is int and 0 <= n < 2**40 for n in numbers) or (
    len(shape) != len(strides)
  ):
    raise ValueError(f'tensor {key} has sizes {numbers}')
  storage = np.frombuffer(raw, dtype, len(raw) // dtype.itemsize)
  count = math.prod(shape)
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if count and (last >= len(storage) or count > len(storage)):
    raise ValueError(
      f'tensor {key} of {count:,} numbers reaches beyond its storage of '
      f'{len(storage):,}'
    )
  steps = [s * dtype.itemsize for s in strides]
  view = np.lib.stride_tricks.as_strided(
    storage[offset:] if count else storage[:0], shape, steps
  )
  is_float = dtype.kind not in 'biu'
  with np.errstate(over='ignore'):
    return np.array(view, np.float32 if is_float else dtype, order='C')


def read_pickled(raw: bytes) -> dict[str, np.ndarray]:
  """Reads what torch.save wrote of a dictionary of tensors.

  Args:
    raw: a zip archive.

  Raises:
    Exception: nearly any kind, if the contents are damaged or hold anything
      but a dictionary of dense tensors.
  """
  with zipfile.ZipFile(io.BytesIO(raw)) as archive:
    sizes = sum(info.file_size for info in archive.infolist())
    if sizes > len(raw):  # torch does not compress
      raise ValueError(f'{len(raw):,} bytes expand to {sizes:,}')
    (name,) = (n for n in archive.namelist() if n.endswith('data.pkl'))
    pickled = archive.read(name)
    for instruction, argument, _ in pickletools.genops(pickled):
      if instruction.name not in _INSTRUCTIONS or (
        instruction.name == 'LONG_BINPUT' and int(argument or 0) > len(pickled)
      ):
        raise ValueError(f'the instruction {instruction.name} in a pickle')
    folder = name.removesuffix('data.pkl') + 'data/'
    found = _Unpickler(pickled, archive, folder).load()
  if not isinstance(found, dict) or not all(
    isinstance(key, str) and isinstance(value, np.ndarray)
    for key, value in found.items()
  ):
    raise TypeError('a pickle of something else than a dictionary of tensors')
  return dict(found)


class _Unpickler(pickle.Unpickler):
  """Makes numpy arrays of tensors, and nothing else."""

  def __init__(self, raw: bytes, archive: zipfile.ZipFile, folder: str):
    super().__init__(io.BytesIO(raw))
    self._archive, self._folder = archive, folder
    # Tensors can share a storage, and half precision becomes float32.
    self._left = _MOST_COPIES * sum(i.file_size for i in archive.infolist())

  def find_class(self, module: str, name: str) -> Any:
    known = {
      'collections.OrderedDict': collections.OrderedDict,
      'torch._utils._rebuild_tensor_v2': self._tensor,
      'torch._utils._rebuild_parameter': _parameter,
    }
    if module == 'torch' and name in _STORAGES:
      return name
    if f'{module}.{name}' in known:
      return known[f'{module}.{name}']
    raise ValueError(f'{module}.{name} in a pickle of tensors')

  def persistent_load(self, pid: Any) -> Any:
    _, storage, member, _, _ = pid
    return self._archive.read(f'{self._folder}{member}'), _STORAGES[storage]

  def _tensor(self, storage, offset, shape, strides, *_: Any) -> np.ndarray:
    raw, dtype = storage
    array = strided('of a pickle', raw, dtype, shape, strides, offset)
    self._left -= array.nbytes
    if self._left < 0:
      raise ValueError('far more numbers than its storages hold')
    return array


def _parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
  return tensor
