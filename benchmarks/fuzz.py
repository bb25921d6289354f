"""Damaged and hostile input files and configs: each must load or be refused.

    python -m benchmarks.fuzz [--inputs=10000] [--seed=0] [--input=NUMBER]

Whatever is wrong with an input, it ends in success or in an `InputError`, in
seconds, within bounded memory, with nothing run and nothing written outside its
own folder. All else is a finding, printed with its number: `--input=NUMBER`
runs that one again and shows the traceback. Exit code 1: there are findings.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import resource
import runpy
import shutil
import struct
import sys
import tempfile
import time
import traceback
import types
import unittest.mock
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from clusterq_jax import config as config_lib
from clusterq_jax import convert, data, weights
from clusterq_jax import main as main_lib
from clusterq_jax.deploy import student as student_lib
from clusterq_jax.errors import InputError
from clusterq_jax.models import registry
from clusterq_jax.modes import train
from clusterq_jax.runtime import evaluation, reuse
from clusterq_jax.runtime import session as experiment
from clusterq_jax.weights import layouts, matching, teacher

try:
  import torch
except ImportError:
  torch = None

_HANG_S = 10.0  # of processor time
_WAIT_S = 180.0  # where it waits for something
_START_S = 120.0  # of a worker
_GROWTH = 3 * 2**28  # bytes of resident memory that one input may add
_ADDRESS_SPACE = 2**33  # and of address space
_BOMB = 2**30  # bytes that a bomb becomes
_ARCH, _SIDE, _CLASSES = 'resnet8', 8, 4
_CONFIG = """
from clusterq_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.teacher.arch = 'resnet8'
  config.teacher.weights = {weights!r}
  config.generator.latent_dim = 8
  config.generator.channels = (8, 8, 8)
  config.schedule.batch_size = 8
  config.schedule.warmup_steps = 2
  config.schedule.generator_steps = 3
  config.schedule.joint_steps = 2
  config.schedule.student_steps = 3
  config.schedule.pool_batches = 2
{changes}
  return config
"""

Random = np.random.Generator

# --- Mutations of bytes ------------------------------------------------------

_LENGTHS = (0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**60, 2**64 - 1)


def _place(random: Random, size: int) -> int:
  """Anywhere, or near the beginning or the end, where formats keep headers."""
  near = int(random.integers(1, 2000))
  where = random.integers(3)
  if where == 0 or near >= size:
    return int(random.integers(max(size, 1)))
  return near if where == 1 else size - near


def _flip(random: Random, raw: bytes) -> bytes:
  changed = bytearray(raw)
  for _ in range(random.integers(1, 9)):
    changed[_place(random, len(raw))] ^= 1 << random.integers(8)
  return bytes(changed)


def _truncate(random: Random, raw: bytes) -> bytes:
  return raw[: _place(random, len(raw))]


def _remove(random: Random, raw: bytes) -> bytes:
  start = _place(random, len(raw))
  return raw[:start] + raw[start + int(random.integers(1, 300)) :]


def _repeat(random: Random, raw: bytes) -> bytes:
  start, length = _place(random, len(raw)), int(random.integers(1, 300))
  return raw[: start + length] + raw[start:]


def _length_field(random: Random, raw: bytes) -> bytes:
  width = int(random.choice([1, 2, 4, 8]))
  order = random.choice(['little', 'big'])
  value = _pick(random, _LENGTHS) % 256**width
  start = _place(random, len(raw))
  return raw[:start] + value.to_bytes(width, order) + raw[start + width :]


def _damage(random: Random, raw: bytes) -> bytes:
  """One to three mutations that know nothing of the format."""
  mutations = (_flip, _truncate, _remove, _repeat, _length_field)
  for _ in range(random.integers(1, 4)):
    if raw:
      raw = _pick(random, mutations)(random, raw)
  return raw


def _pick(random: Random, choices):
  return choices[int(random.integers(len(choices)))]


# --- Values that fields are given --------------------------------------------

_TEXTS = (
  '',
  '../escaped',
  '../../escaped',
  '/escaped',
  'a\x00b',
  'two\nlines',
  '\x1b[31mred',
  'é\udc80',
  'x' * 200_000,
  '9' * 5000,
  '-1',
  'nan',
  '1e999',
  '[]',
  '{}',
  'null',
  '[[]]',
  '[1e400, 0, 0]',
  '{"a": [1, {"b": null}]}',
  '[' * 5000,
)
_VALUES = (
  None,
  True,
  0,
  1,
  -1,
  3,
  7,
  2**31,
  2**63,
  10**30,
  -(2**40),
  0.5,
  -2.5,
  1e-30,
  1e30,
  float('inf'),
  float('nan'),
  (),
  (1,),
  (8, 8),
  (0, 8),
  (-1, 8, 8),
  (8.5, 8),
  ('a', 'b'),
  (None, None),
  ((1, 2), (3, 4)),
  (1e300, 2.0, 3.0),
  (2**40, 8, 8),
  [],
  [1, 2],
  {},
  {'a': 1},
  *_TEXTS,
)


def _change_json(random: Random, value: Any, depth: int = 0) -> Any:
  """Replaces, removes or adds something somewhere in a tree of JSON."""
  if isinstance(value, dict) and value and (depth == 0 or random.integers(4)):
    key = _pick(random, sorted(value))
    changed = dict(value)
    action = random.integers(8)
    if action == 0:
      del changed[key]
    elif action == 1:
      changed[_pick(random, _TEXTS)] = changed.pop(key)
    else:
      changed[key] = _change_json(random, value[key], depth + 1)
    return changed
  if isinstance(value, list) and value and random.integers(3):
    index = int(random.integers(len(value)))
    changed = _change_json(random, value[index], depth + 1)
    return [*value[:index], changed, *value[index + 1 :]]
  if isinstance(value, str) and random.integers(2):
    return _pick(random, _TEXTS)  # safetensors' metadata are strings
  return _pick(random, _VALUES)


# --- Weight files ------------------------------------------------------------


def _safetensors(random: Random, raw: bytes) -> bytes:
  """Changes the header, and now and then its length."""
  size = int.from_bytes(raw[:8], 'little')
  header = json.loads(raw[8 : 8 + size])
  part = '__metadata__' if random.integers(2) else _pick(random, list(header))
  header[part] = _change_json(random, header[part])
  text = json.dumps(header).encode()
  length = len(text)
  if not random.integers(4):
    length = _pick(random, _LENGTHS)
  return length.to_bytes(8, 'little') + text + raw[8 + size :]


def _contents(random: Random, raw: bytes) -> bytes:
  """A whole file in which a tensor, or a text of the metadata, is odd."""
  tensors = safetensors.numpy.load(raw)
  size = int.from_bytes(raw[:8], 'little')
  metadata = json.loads(raw[8 : 8 + size])['__metadata__']
  if random.integers(2):
    key = _pick(random, sorted(metadata))
    try:
      value = json.loads(metadata[key])
    except ValueError:
      value = metadata[key]
    changed = _change_json(random, value)
    text = changed if isinstance(changed, str) else json.dumps(changed)
    metadata[key] = text.encode('utf-8', 'replace').decode()
  else:
    key = _pick(random, sorted(tensors))
    odd = _pick(
      random,
      [
        lambda a: a.T,
        lambda a: a.reshape(-1),
        lambda a: np.atleast_1d(a)[..., :1],
        lambda a: a[None],
        lambda a: np.atleast_1d(a)[:0],
        lambda a: -a,
        lambda a: a * 1e30,
        lambda a: a + np.nan,
        lambda a: a.astype(np.float16),
        lambda a: a.astype(np.float64),
        lambda a: a.astype(np.int32),
        lambda a: a > 0,
      ],
    )
    tensors[key] = np.ascontiguousarray(odd(tensors[key]))
  return safetensors.numpy.save(tensors, metadata)


def _npy(random: Random, raw: bytes) -> bytes:
  """An array whose header says something else, or that is a pickle."""
  kind = random.integers(3)
  if kind == 0:
    return b'\x93NUMPY\x01\x00\x76\x00' + pickle.dumps(_Run('escaped'))
  if kind == 1:
    out = io.BytesIO()
    np.save(out, np.array([_Run('escaped')], object), allow_pickle=True)
    return out.getvalue()
  shape = _pick(random, [(2**60,), (2**31, 2**31), (-1,), (10**9,), (0,), ()])
  dtype = _pick(random, ['<f4', '<f8', '|O', '<U9', '<c8', '|u1', 'x', '<f2'])
  return _npy_header(dtype, shape) + raw[128:]


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
  header = repr({'descr': dtype, 'fortran_order': False, 'shape': shape})
  text = header.encode().ljust(117) + b'\n'
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text


def _rezip(random: Random, raw: bytes, change: Callable) -> bytes:
  """Changes one member of a zip archive: its contents, name or sizes."""
  out = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(raw)) as old,
    zipfile.ZipFile(out, 'w') as new,
    warnings.catch_warnings(),
  ):
    warnings.simplefilter('ignore')  # names that are there twice
    members = {info.filename: old.read(info) for info in old.infolist()}
    victim = _pick(random, list(members))
    kind = random.integers(6)
    for name, contents in members.items():
      if name == victim or (name.endswith('data.pkl') and kind == 5):
        if kind == 0:
          continue
        if kind == 1:
          name = _pick(random, _TEXTS[:7]) + '.npy'
        elif kind == 2:
          new.writestr(name, contents)  # twice
        elif kind == 3 and not random.integers(8):
          _add_bomb(new, name, contents)
          continue
        else:
          contents = change(random, contents)
      new.writestr(name.encode('utf-8', 'replace').decode(), contents)
  return out.getvalue()


def _add_bomb(archive: zipfile.ZipFile, name: str, head: bytes) -> None:
  """Adds a member that is a thousand times larger than what it takes."""
  info = zipfile.ZipInfo(name)
  info.compress_type = zipfile.ZIP_DEFLATED
  shape = ((_BOMB - 128) // 4,)
  with archive.open(info, 'w') as member:
    if name.endswith('.npy'):
      head = _npy_header('<f4', shape)
    member.write(head)
    for _ in range(_BOMB // 2**20):
      member.write(bytes(2**20))


def _lying_sizes(random: Random, raw: bytes) -> bytes:
  """Other sizes in the central directory, which comes last."""
  changed = bytearray(raw)
  starts = [m.start() for m in re.finditer(b'PK\x01\x02', raw)]
  start = _pick(random, starts)
  field = _pick(random, [16, 20, 24, 28, 42])  # crc, sizes, name, offset
  struct.pack_into('<I', changed, start + field, _pick(random, _LENGTHS[:7]))
  return bytes(changed)


class _Run:
  """Its pickle runs a command when opened."""

  def __init__(self, target: str):
    self.target = target

  def __reduce__(self):
    return os.system, (f'touch {self.target}',)


_OPCODES = (
  b'cos\nsystem\n(S"touch ../escaped"\ntR.',
  b"cbuiltins\nexec\n(S\"open('../escaped', 'w')\"\ntR.",
  b'\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x10touch ../escaped\x85R.',
  b'\x80\x02ctorch\nload\n(S"/etc/passwd"\ntR.',
  b'\x80\x02ctorch.hub\nload\n(S"a"\nS"b"\ntR.',
  b'\x80\x02ctorch.serialization\n_load\n)R.',
  b'\x80\x02c__builtin__\nbytearray\n(\x8a\x08\x00\x00\x00\x00\x00\x01\x00\x00tR.',
  b'\x80\x02c__builtin__\nbytearray\n(J\x00\x00\x00\x70tR.',
  b'\x80\x02ccollections\nOrderedDict\n)R}(b.',
  b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01K\x01tR.',
  b'\x80\x02ctorch\nSize\n(J\xff\xff\xff\xff\x85tR.',
  b'\x80\x02' + b'(' * 100_000 + b'.',
  b'\x80\x02]' + b'\x85' * 50_000 + b'.',
  b'\x80\x02X\xff\xff\xff\x7fa.',
  b'\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.',
)


def _pickled(random: Random, raw: bytes) -> bytes:
  """Another pickle, or the same with code in its midst."""
  kind = random.integers(4)
  if kind == 0:
    return pickle.dumps(_Run('../escaped'), int(random.integers(2, 6)))
  if kind == 1:
    return _pick(random, _OPCODES)
  if kind == 2:
    names = sorted(set(re.findall(rb'c([\w.]+\n\w+)\n', raw)))
    new = _pick(random, [b'os\nsystem', b'builtins\neval', b'torch\nadd'])
    return raw.replace(_pick(random, names), new) if names else raw
  at = int(random.integers(2, max(3, len(raw))))
  return raw[:at] + _pick(random, _OPCODES)[:-1] + raw[at:]


def _odd_state(random: Random, state: dict[str, Any]) -> Any:
  """A whole torch file that holds something unusual."""
  key = _pick(random, list(state))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    odd = _pick(
      random,
      [
        lambda: torch.zeros(1).expand(2**40),
        lambda: torch.zeros(1).expand(2**20, 2**20, 2**20),
        lambda: torch.zeros(2, 3).to_sparse(),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: torch.zeros(3, device='meta'),
        lambda: torch.zeros(2**50, device='meta'),
        lambda: torch.zeros(3).to(torch.float8_e4m3fn),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.zeros(3, requires_grad=True),
        lambda: torch.zeros(3).to(torch.uint16),
        lambda: torch.nn.Parameter(torch.zeros(4)),
        lambda: state[key].flatten()[::2],
        lambda: state[key].to(torch.complex64).conj(),
        lambda: state[key].bool(),
        lambda: {'a': torch.zeros(1)},
        lambda: _Run('../escaped'),
        lambda: state[key].double() * 1e300,
        lambda: 'text',
      ],
    )()
  changed = {**state, key: odd}
  wrap = [
    lambda: changed,
    lambda: {'state_dict': changed, 'epoch': 3},
    lambda: {'state_dict': {'state_dict': changed}},
    lambda: {1: changed[key]},
    lambda: list(changed.values()),
    lambda: odd,
  ]
  return wrap[min(int(random.integers(8)), 5)]()


# --- Images ------------------------------------------------------------------


@functools.cache
def _png(width: int, height: int, pixels: bytes = b'') -> bytes:
  """A grey PNG; without pixels all are black, whatever the size."""

  def chunk(name: bytes, contents: bytes) -> bytes:
    crc = zlib.crc32(name + contents)
    return (
      struct.pack('>I', len(contents))
      + name
      + contents
      + struct.pack('>I', crc)
    )

  head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
  squeeze = zlib.compressobj(1)
  body = [squeeze.compress(pixels)]
  if not pixels:
    rows = bytes(width + 1)
    body += [squeeze.compress(rows) for _ in range(min(height, 10_000))]
  body.append(squeeze.flush())
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', head)
    + chunk(b'IDAT', b''.join(body))
    + chunk(b'IEND', b'')
  )


# Sizes that lie, and bombs that do not.
_PNGS = (
  lambda: _png(2**31 - 1, 2**31 - 1, b'\0'),
  lambda: _png(2**31, 1, b'\0'),
  lambda: _png(0, 0, b'\0'),
  lambda: _png(13_000, 13_000),
  lambda: _png(10_000, 9_000),
  lambda: _png(1, 10_000),
  lambda: _png(2_000_000, 1),
  lambda: _png(80_000_000, 1),
  lambda: (
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n'
    b'(../escaped) (w) file closefile showpage\n'
  ),
)
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP', 'ICO', 'TGA')


def _picture(random: Random, kind: str) -> bytes:
  """A sound image file, of this format."""
  out = io.BytesIO()
  mode = _pick(random, ['RGB', 'L', 'P', '1', 'RGBA', 'I;16'])
  mode = mode if kind in ('PNG', 'TIFF') else 'RGB'
  side = int(random.integers(8, 30))
  pixels = random.integers(0, 256, (side, side, 3), np.uint8)
  image = Image.fromarray(pixels)
  if mode == 'I;16':
    image = Image.fromarray(pixels[..., 0].astype(np.uint16))
  else:
    image = image.convert(mode)
  image.save(out, kind)
  return out.getvalue()


_ROWS = (
  'file,label',
  'a.png,0',
  'b.png,3',
  'a.png,' + '9' * 5000,
  'a.png,99999999999',
  'a.png,-1',
  'a.png,1.5',
  'a.png,²',
  'a.png,٣',
  'a.png,',
  ',1',
  '../../secret.png,1',
  '/dev/zero,1',
  '/dev/null,1',
  'images,1',
  'a\x00b.png,1',
  'x' * 200_000 + ',1',
  '"unclosed,1',
  'a.png,1,2,3',
  '\udc80,1',
)

# --- Kinds: one mutated input, and the entry points that a command reaches ----


class _Seeds:
  """Sound inputs to start from, made once in each worker."""

  def __init__(self, folder: pathlib.Path):
    random = np.random.default_rng(0)
    self.teacher = folder / 'teacher.safetensors'
    metadata = {
      'format': weights.FORMAT,
      'arch': _ARCH,
      'image_size': f'[{_SIDE}, {_SIDE}]',
      'mean': '[0.5, 0.45, 0.4]',
      'std': '[0.25, 0.22, 0.2]',
      'pixel_range': '1.0',
      'channel_order': 'rgb',
      'class_names': json.dumps(['ant', 'bee', 'cat', 'dog']),
    }
    registered = registry.architecture(_ARCH)
    options = {'num_classes': _CLASSES, 'shortcut': 'pad'}
    layers = matching.layers_of(registered, 3, **options)
    variables: dict[str, Any] = {'params': {}, 'batch_stats': {}}
    akamaster = layouts.known(_ARCH)[0]
    self.state = {}
    for layer in layers:
      for leaf, shape in layer.shapes.items():
        value = random.uniform(0.5, 1, shape).astype(np.float32)
        group = variables[layouts.COLLECTIONS[leaf]]
        group.setdefault(layer.name, {})[leaf] = value
        source = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        self.state[akamaster.key(layer, leaf)] = np.ascontiguousarray(source)
    weights.write_safetensors(self.teacher, variables, metadata)
    self.safetensors = self.teacher.read_bytes()
    self.npz = _saved(np.savez, **self.state)
    self.config_file = folder / 'config.py'
    self.config_file.write_text(self.config_text(''))
    self.config = runpy.run_path(str(self.config_file))['get_config']()
    self.loaded = experiment.load_teacher(self.config)
    self._write_student(folder / student_lib.FILE)
    self.student = (folder / student_lib.FILE).read_bytes()
    pixels = random.integers(0, 256, (6, _SIDE, _SIDE, 3), np.uint8)
    labels = np.arange(6) % _CLASSES
    self.images = _saved(np.savez_compressed, images=pixels, labels=labels)
    if torch is not None:
      self.torch_state = {k: torch.tensor(v) for k, v in self.state.items()}
      self.pth = {
        zipped: _torch_file(self.torch_state, zipped)
        for zipped in (True, False)
      }

  def config_text(self, changes: str) -> str:
    return _CONFIG.format(weights=str(self.teacher), changes=changes)

  def _write_student(self, path: pathlib.Path) -> None:
    steps = experiment.make_steps(self.config, self.loaded)
    state = jax.eval_shape(steps.init, jax.random.key(0), self.loaded.variables)
    student = jax.tree.map(
      lambda s: np.full(s.shape, 0.5, s.dtype), state.student
    )
    student_lib.save(
      path,
      {**student, 'batch_stats': self.loaded.variables['batch_stats']},
      _ARCH,
      self.loaded.options,
      experiment.bits_of(self.config),
      steps.plan.learned,
      self.loaded.preprocessing,
      self.loaded.class_names,
    )


def _saved(save: Callable, **arrays: np.ndarray) -> bytes:
  out = io.BytesIO()
  save(out, **arrays)
  return out.getvalue()


def _torch_file(state: Any, zipped: bool) -> bytes:
  out = io.BytesIO()
  torch.save(state, out, _use_new_zipfile_serialization=zipped)
  return out.getvalue()


def _read_teacher(path: pathlib.Path) -> None:
  convert.convert(_ARCH, str(path), str(path.with_name('new.safetensors')))
  own = path.suffix == '.safetensors'
  expected = {} if own else dict(image_size=(8, 8), mean=(0,) * 3, std=(1,) * 3)
  teacher.load(_ARCH, str(path), **expected)


def _weights(suffix: str, random: Random, seeds: _Seeds, folder) -> None:
  if suffix == '.npz':
    raw = seeds.npz
    mutations = (
      _damage,
      functools.partial(_rezip, change=_npy),
      _lying_sizes,
    )
  else:
    raw = seeds.safetensors
    mutations = (_damage, _safetensors, _contents)
  file = folder / f'a{suffix}'
  file.write_bytes(_pick(random, mutations)(random, raw))
  _read_teacher(file)


def _pth(zipped: bool, random: Random, seeds: _Seeds, folder) -> None:
  raw = seeds.pth[zipped]
  kind = random.integers(4)
  if kind == 0:
    raw = _torch_file(_odd_state(random, seeds.torch_state), zipped)
  elif kind == 1:
    raw = _damage(random, raw)
  elif zipped:
    change = functools.partial(_rezip, change=_pickled)
    raw = (change if kind == 2 else _lying_sizes)(random, raw)
  else:
    raw = _pickled(random, raw)
  file = folder / 'a.pth'
  file.write_bytes(raw)
  _read_teacher(file)


def _student(random: Random, seeds: _Seeds, folder) -> None:
  file = folder / student_lib.FILE
  mutate = _pick(random, (_damage, _safetensors, _contents))
  file.write_bytes(mutate(random, seeds.student))
  student = student_lib.load(folder)
  images = jax.ShapeDtypeStruct((2, *student.preprocessing.shape), np.uint8)
  jax.eval_shape(student.logits, images)


def _evaluate(images: data.Images) -> None:
  """As a run does, with a network that is a function of numpy."""
  networks = {'teacher': lambda x: np.zeros((len(x), _CLASSES), np.float32)}
  evaluation.on_images(networks, images, 4)


def _images_npz(random: Random, seeds: _Seeds, folder) -> None:
  mutations = (_damage, functools.partial(_rezip, change=_npy), _lying_sizes)
  file = folder / 'a.npz'
  file.write_bytes(_pick(random, mutations)(random, seeds.images))
  shape = seeds.loaded.preprocessing.shape
  _evaluate(data.load('npz', str(file), shape, _CLASSES))


def _folder(kind: str, random: Random, seeds: _Seeds, folder) -> None:
  """One sound image and one that is not, in class folders."""
  for name in ('1', '3'):
    (folder / name).mkdir()
  raw = _picture(random, kind)
  way = random.integers(12)
  if way == 0:
    raw = _pick(random, _PNGS)()
  elif way == 1:
    raw = _damage(random, _picture(random, _pick(random, _FORMATS)))
  else:
    raw = _damage(random, raw)
  (folder / '1' / f'a.{kind.lower()}').write_bytes(raw)
  (folder / '3' / 'a.png').write_bytes(_picture(random, 'PNG'))
  shape = seeds.loaded.preprocessing.shape
  resize = int(random.choice([0, _SIDE]))
  _evaluate(data.load('folder', str(folder), shape, _CLASSES, resize))


def _csv(random: Random, seeds: _Seeds, folder) -> None:
  for name in ('a.png', 'b.png'):
    (folder / name).write_bytes(_picture(random, 'PNG'))
  rows = [
    'file,label',
    *(f'{n}.png,{i % _CLASSES}' for i, n in enumerate('ababab')),
  ]
  for _ in range(random.integers(1, 3)):
    rows[int(random.integers(len(rows)))] = _pick(random, _ROWS)
  raw = '\n'.join(rows).encode('utf-8', 'surrogateescape')
  if not random.integers(3):
    raw = _damage(random, raw)
  (folder / 'labels.csv').write_bytes(raw)
  shape = seeds.loaded.preprocessing.shape
  _evaluate(data.load('folder', str(folder), shape, _CLASSES))


class _ReachedError(Exception):
  """The command line got as far as compiling."""


def _trace(config, teacher, images, steps, folder, began) -> None:
  """In place of `train._quantize`: what comes before the first compilation."""
  key = jax.random.key(config.seed)
  state = jax.eval_shape(steps.init, key, teacher.variables)
  if config.generator.workdir:
    step = types.SimpleNamespace(sharding=None)
    reuse.take_generator(config, teacher, key, types.SimpleNamespace(step=step))
  jax.eval_shape(steps.generate, state.generator, key)
  if images is not None:
    _evaluate(images)
  raise _ReachedError


def _command(*arguments: str) -> None:
  """The command line. Raises InputError with what it refused.

  Raises:
    AssertionError: it ended otherwise than with one line and exit code 2.
  """
  argv = ['main', '--distributed=off', *arguments]
  error = io.StringIO()
  with (
    unittest.mock.patch.object(sys, 'argv', argv),
    unittest.mock.patch.object(train, '_quantize', _trace),
    flagsaver.as_parsed(),
    contextlib.redirect_stderr(error),
  ):
    flags.FLAGS.unparse_flags()
    try:
      code = main_lib.main(argv)
    except _ReachedError:
      return
  said = error.getvalue()
  one_line = said.startswith('error: ') and said.count('\n') == 1
  assert code == 2, f'exit code {code}: {said}'
  assert one_line, said
  raise InputError(said.strip())


def _fields() -> list[str]:
  return sorted(config_lib.flatten(config_lib.defaults()))


def _flags(random: Random, seeds: _Seeds, folder) -> None:
  """Overrides on the command line: of any field, to any value."""
  given = []
  for _ in range(random.integers(1, 3)):
    value = _pick(random, _VALUES)
    text = value if isinstance(value, str) else repr(value)
    text = text.replace('\0', '')  # no argument can have one
    field = _pick(random, _fields())
    if not random.integers(20):
      field = _pick(random, ['a', 'teacher', 'teacher.', 'student.lr.x', ''])
    given.append(f'--config.{field}={text[:1000]}')
  _command(
    f'--config={seeds.config_file}', f'--workdir={folder / "run"}', *given
  )


def _file(random: Random, seeds: _Seeds, folder) -> None:
  """A config file that sets anything to anything."""
  lines = []
  for _ in range(random.integers(1, 3)):
    section, _, name = _pick(random, _fields()).rpartition('.')
    target = f'config.{section}' if section else 'config'
    value = repr(_pick(random, _VALUES))
    value = re.sub(r'\b(inf|nan)\b(?!\')', r"float('\1')", value)
    assign = f'{target}.{name} = {value}'
    if random.integers(2):
      assign = f'with config.ignore_type(): {assign}'
    lines.append(f'  {assign}')
  file = folder / 'config.py'
  raw = seeds.config_text('\n'.join(lines)).encode('utf-8', 'replace')
  file.write_bytes(raw if random.integers(8) else _damage(random, raw))
  _command(f'--config={file}', f'--workdir={folder / "run"}')


def _stored(random: Random, seeds: _Seeds, folder) -> None:
  """config.json of the workdir, or of the one whose generator is taken."""
  given = [f'--config={seeds.config_file}', f'--workdir={folder / "run"}']
  name = 'run'
  if random.integers(2):
    name = 'other'
    given += [
      f'--config.generator.workdir={folder / name}',
      '--config.schedule.joint_steps=0',
    ]
  stored = json.loads(config_lib.to_json(seeds.config))
  if name == 'other':
    stored['schedule']['joint_steps'] = 0
  if random.integers(4):
    text = json.dumps(_change_json(random, stored))
  else:
    text = json.dumps(stored)
  raw = text.encode()
  if not random.integers(3):
    raw = _damage(random, raw)
  (folder / name).mkdir()
  (folder / name / 'config.json').write_bytes(raw)
  _command(*given)


KINDS: dict[str, Callable[[Random, _Seeds, pathlib.Path], None]] = {
  'weights .safetensors': functools.partial(_weights, '.safetensors'),
  'weights .npz': functools.partial(_weights, '.npz'),
  'weights .pth, zip': functools.partial(_pth, True),
  'weights .pth, pickle': functools.partial(_pth, False),
  'student.safetensors': _student,
  'images .npz': _images_npz,
  'images .png': functools.partial(_folder, 'PNG'),
  'images .jpeg': functools.partial(_folder, 'JPEG'),
  'labels.csv': _csv,
  'config flags': _flags,
  'config file': _file,
  'config.json': _stored,
}
if torch is None:
  KINDS = {k: v for k, v in KINDS.items() if '.pth' not in k}


def kind_of(number: int) -> str:
  return list(KINDS)[number % len(KINDS)]


# --- The worker: one input after the other, watched ---------------------------


class _Watch:
  """Notes commands that are run, and files opened for writing elsewhere.

  Python tells of both before they happen; a look at the folders around finds
  what other code has written.
  """

  def __init__(self):
    self.folder = pathlib.Path('/')
    self.seen: list[str] = []
    sys.addaudithook(self._hook)

  def _hook(self, event: str, arguments: tuple) -> None:
    if event in ('os.system', 'os.exec', 'os.posix_spawn', 'subprocess.Popen'):
      self.seen.append(f'{event} {arguments[:2]!r:.200}')
    elif event == 'open' and isinstance(arguments[0], (str, bytes)):
      path, _, how = arguments
      writes = how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
      path = os.path.abspath(os.fsdecode(path))
      inside = path.startswith(f'{self.folder}/') or path == os.devnull
      if writes and not inside:
        self.seen.append(f'written: {path}')


def _memory(name: str) -> int:
  """A figure of /proc/self/status, bytes."""
  text = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.search(rf'{name}:\s+(\d+)', text)[1])


def _outcome(
  number: int, seed: int, seeds: _Seeds, root: pathlib.Path, watch: _Watch
) -> tuple[str, str]:
  """('loaded' | 'refused' | 'finding', what was said)."""
  folder = root / 'inside' / 'input'
  folder.mkdir(parents=True)
  os.chdir(folder)
  random = np.random.default_rng([seed, number])
  found, said = 'loaded', ''
  before = _memory('VmRSS')
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak
  watch.folder, watch.seen = folder, []
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      KINDS[kind_of(number)](random, seeds, folder)
  except InputError as e:
    found, said = 'refused', str(e)
    if re.search(r'[\x00-\x1f\x7f]', said):
      found, said = 'finding', f'more than a line of text: {said!r}'
  except BaseException:
    found, said = 'finding', traceback.format_exc()
  grown = _memory('VmHWM') - before
  strays = [p for p in (root, root / 'inside') if len(list(p.iterdir())) != 1]
  if grown > _GROWTH:
    found, said = 'finding', f'{grown / 2**20:.0f} MiB of memory; {said}'
  if watch.seen or strays or pathlib.Path('/escaped').exists():
    found, said = 'finding', f'{watch.seen or "a file outside"}; {said}'
  watch.folder = root
  os.chdir(root)
  shutil.rmtree(root / 'inside')
  return found, said


def _work(
  connection, root: pathlib.Path, seed: int, numbers: Sequence[int], loud: bool
) -> None:
  """Sends an `_outcome` for each number, after a first one without meaning."""
  jax.config.update('jax_platforms', 'cpu')
  if not loud:  # decoders talk
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
  warnings.simplefilter('ignore')
  for name in ('seeds', 'around'):
    (root / name).mkdir()
  seeds = _Seeds(root / 'seeds')
  watch = _Watch()
  limit = _memory('VmSize') + _ADDRESS_SPACE
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  connection.send(('', ''))
  for number in numbers:
    connection.send(_outcome(number, seed, seeds, root / 'around', watch))


class Result(NamedTuple):
  """What became of an input; outcome: 'loaded', 'refused' or 'finding'."""

  number: int
  kind: str
  outcome: str
  said: str


def _hangs(connection, pid: int) -> bool:
  """Waits for an outcome; whether that takes too long on however busy a CPU."""

  def used() -> float:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    ticks = sum(map(int, stat.rpartition(')')[2].split()[11:13]))
    return ticks / os.sysconf('SC_CLK_TCK')

  before, end = used(), time.monotonic() + _WAIT_S
  while not connection.poll(1):
    if used() - before > _HANG_S or time.monotonic() > end:
      return True
  return False


def run(
  seed: int, numbers: Sequence[int], loud: bool = False
) -> Iterator[Result]:
  """Tries the inputs of these numbers, in processes of their own.

  A process that dies or hangs is a finding, and another goes on after it.
  """
  context = multiprocessing.get_context('spawn')
  while numbers:
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    root = pathlib.Path(folder.name).resolve()
    here, there = context.Pipe(duplex=False)
    worker = context.Process(
      target=_work, args=(there, root, seed, numbers, loud)
    )
    worker.start()
    there.close()
    try:
      if not here.poll(_START_S):
        raise TimeoutError(f'the worker did not start in {_START_S} s')
      here.recv()
      while numbers:
        number, *numbers = numbers
        outcome, said = 'finding', f'took over {_HANG_S} s'
        hangs = _hangs(here, worker.pid)
        if not hangs:
          try:
            outcome, said = here.recv()
          except EOFError:
            worker.join()
            hangs, said = True, f'the process died: {worker.exitcode}'
        yield Result(number, kind_of(number), outcome, said)
        if hangs:
          break
    finally:
      worker.kill()
      worker.join()
      folder.cleanup()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--inputs', type=int, default=10_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--input', type=int, help='this one alone')
  args = parser.parse_args()
  alone = args.input is not None
  numbers = [args.input] if alone else list(range(args.inputs))
  counts: dict[str, collections.Counter] = {
    k: collections.Counter() for k in KINDS
  }
  found = 0
  start = time.monotonic()
  try:
    for result in run(args.seed, numbers, loud=alone):
      counts[result.kind][result.outcome] += 1
      if result.outcome == 'finding' or alone:
        said = result.said if alone else result.said.strip().splitlines()[-1]
        print(
          f'seed {args.seed} input {result.number}, {result.kind}: '
          f'{result.outcome}: {said[: 5000 if alone else 200]}',
          flush=True,
        )
      found += result.outcome == 'finding'
  except KeyboardInterrupt:
    print('stopped; so far:')
  columns = 'loaded', 'refused', 'finding'
  print(f'{"kind":<22}{"inputs":>9}' + ''.join(f'{c:>9}' for c in columns))
  for kind, count in [
    *counts.items(),
    ('all', sum(counts.values(), collections.Counter())),
  ]:
    row = count.total(), *(count[c] for c in columns)
    print(f'{kind:<22}' + ''.join(f'{n:>9}' for n in row))
  if torch is None:
    print('torch is not installed: no .pth files')
  print(f'{time.monotonic() - start:.0f} s')
  return 1 if found else 0


if __name__ == '__main__':
  sys.exit(main())
