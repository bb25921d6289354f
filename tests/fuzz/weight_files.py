"""Mutations of weight files: safetensors, zip archives and pickles."""

import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from clusterq_jax.models.node import OPTIONS
from tests.fuzz import mutations
from tests.fuzz.mutations import Random, pick

try:
  import torch
except ImportError:
  torch = None

_BOMB = 2**30  # bytes that a bomb becomes


def header(random: Random, raw: bytes) -> bytes:
  """Changes the header of a safetensors file, sometimes its length too."""
  size = int.from_bytes(raw[:8], 'little')
  fields = json.loads(raw[8 : 8 + size])
  part = '__metadata__' if random.integers(2) else pick(random, list(fields))
  fields[part] = mutations.change_json(random, fields[part])
  text = json.dumps(fields).encode()
  length = len(text)
  if not random.integers(4):
    length = pick(random, mutations.LENGTHS)
  return length.to_bytes(8, 'little') + text + raw[8 + size :]


def contents(random: Random, raw: bytes) -> bytes:
  """A whole file in which a tensor, or a text of the metadata, is odd."""
  tensors = safetensors.numpy.load(raw)
  size = int.from_bytes(raw[:8], 'little')
  metadata = json.loads(raw[8 : 8 + size])['__metadata__']
  if random.integers(2):
    key = pick(random, sorted(metadata))
    try:
      value = json.loads(metadata[key])
    except ValueError:
      value = metadata[key]
    changed = mutations.change_json(random, value)
    text = changed if isinstance(changed, str) else json.dumps(changed)
    metadata[key] = text.encode('utf-8', 'replace').decode()
  else:
    key = pick(random, sorted(tensors))
    odd = pick(
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


def graph(random: Random, raw: bytes) -> bytes:
  """Changes one or two places of the graph in a safetensors file."""
  size = int.from_bytes(raw[:8], 'little')
  fields = json.loads(raw[8 : 8 + size])
  metadata = fields['__metadata__']
  whole = json.loads(metadata['graph'])
  for _ in range(pick(random, [1, 1, 1, 2])):
    whole = _change_graph(random, whole)
  metadata['graph'] = json.dumps(whole)
  text = json.dumps(fields).encode()
  return len(text).to_bytes(8, 'little') + text + raw[8 + size :]


def _change_graph(random: Random, whole: Any) -> Any:
  """Changes one node, the order of nodes, or anything."""
  nodes = whole.get('nodes') if isinstance(whole, dict) else None
  if not isinstance(nodes, list) or not nodes or not random.integers(8):
    return mutations.change_json(random, whole)
  i = int(random.integers(len(nodes)))
  j = int(random.integers(max(i, 1)))  # before it
  if not (isinstance(nodes[i], dict) and isinstance(nodes[j], dict)):
    return whole
  node = nodes[i]
  fields = OPTIONS.get(str(node.get('op')), ())
  field = pick(random, (*fields, 'name', 'inputs', 'op'))
  changed = pick(
    random,
    [
      lambda: mutations.change_json(random, node),
      lambda: {**node, field: pick(random, mutations.VALUES)},
      lambda: {**node, field: int(random.integers(1, 5))},
      lambda: {**node, field: [int(n) for n in random.integers(1, 4, 2)]},
      lambda: {**node, 'act': pick(random, ['relu', 'gelu', None])},
      lambda: {**node, 'op': nodes[j].get('op')},
      lambda: {**node, 'inputs': nodes[j].get('inputs')},
      lambda: {**node, 'inputs': [nodes[j].get('name')]},
      lambda: {**nodes[j], 'name': node.get('name')},
      lambda: nodes[j],
      lambda: None,
    ],
  )()
  nodes = [*nodes[:i], *([] if changed is None else [changed]), *nodes[i + 1 :]]
  if not random.integers(8):
    nodes = nodes[j:] + nodes[:j]
  elif not random.integers(8):
    nodes = (nodes * int(pick(random, [2, 100, 10_000])))[:100_000]
  return {**whole, 'nodes': nodes}


def npy(random: Random, raw: bytes) -> bytes:
  """An array whose header says something else, or that is a pickle."""
  kind = random.integers(3)
  if kind == 0:
    return b'\x93NUMPY\x01\x00\x76\x00' + pickle.dumps(_Run('escaped'))
  if kind == 1:
    out = io.BytesIO()
    np.save(out, np.array([_Run('escaped')], object), allow_pickle=True)
    return out.getvalue()
  shape = pick(random, [(2**60,), (2**31, 2**31), (-1,), (10**9,), (0,), ()])
  dtype = pick(random, ['<f4', '<f8', '|O', '<U9', '<c8', '|u1', 'x', '<f2'])
  return npy_header(dtype, shape) + raw[128:]


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
  fields = repr({'descr': dtype, 'fortran_order': False, 'shape': shape})
  text = fields.encode().ljust(117) + b'\n'
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text


def rezip(random: Random, raw: bytes, change: Callable) -> bytes:
  """Changes one member of a zip archive: its contents, name or sizes."""
  out = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(raw)) as old,
    zipfile.ZipFile(out, 'w') as new,
    warnings.catch_warnings(),
  ):
    warnings.simplefilter('ignore')  # names that are there twice
    members = {info.filename: old.read(info) for info in old.infolist()}
    victim = pick(random, list(members))
    kind = random.integers(6)
    for name, contents in members.items():
      if name == victim or (name.endswith('data.pkl') and kind == 5):
        if kind == 0:
          continue
        if kind == 1:
          name = pick(random, mutations.TEXTS[:7]) + '.npy'
        elif kind == 2:
          new.writestr(name, contents)  # twice
        elif kind == 3 and not random.integers(8):
          _add_bomb(new, name, contents)
          continue
        else:
          contents = change(random, contents)
      new.writestr(name.encode('utf-8', 'replace').decode(), contents)
  return out.getvalue()


def program(random: Random, raw: bytes) -> bytes:
  """Changes one to three places of JSON, a pickle, or plain bytes."""
  if raw.startswith(b'PK'):
    return rezip(random, raw, pickled)
  try:
    whole = json.loads(raw)
  except ValueError:
    return mutations.damage(random, raw)
  for _ in range(random.integers(1, 4)):
    whole = _change_program(random, whole)
  return json.dumps(whole).encode('utf-8', 'replace')


def _change_program(random: Random, whole: Any) -> Any:
  """Changes one call, or anything."""
  try:
    nodes = whole['graph_module']['graph']['nodes']
  except (KeyError, TypeError):
    return mutations.change_json(random, whole)
  if not isinstance(nodes, list) or not nodes or not random.integers(3):
    return mutations.change_json(random, whole)
  index = int(random.integers(len(nodes)))
  other = pick(random, nodes)
  changed = [
    lambda node: mutations.change_json(random, node),
    lambda node: {**node, 'target': other['target']},
    lambda node: {**node, 'inputs': other['inputs']},
    lambda node: {**node, 'outputs': other['outputs']},
    lambda node: {
      **node,
      'inputs': mutations.change_json(random, node['inputs']),
    },
  ]
  try:
    nodes[index] = pick(random, changed)(nodes[index])
  except (KeyError, TypeError):
    pass  # an earlier change took what it needs
  return whole


def reprogram(random: Random, raw: bytes, change: Callable) -> bytes:
  """Changes the program in a .pt2 file, and nothing else."""
  out = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(raw)) as old,
    zipfile.ZipFile(out, 'w') as new,
  ):
    for name in old.namelist():
      contents = old.read(name)
      if name.endswith(('model.json', 'exported_program.json')):
        contents = change(random, contents)
      new.writestr(name, contents)
  return out.getvalue()


def _add_bomb(archive: zipfile.ZipFile, name: str, head: bytes) -> None:
  """Adds a member that is a thousand times larger than what it takes."""
  info = zipfile.ZipInfo(name)
  info.compress_type = zipfile.ZIP_DEFLATED
  shape = ((_BOMB - 128) // 4,)
  with archive.open(info, 'w') as member:
    if name.endswith('.npy'):
      head = npy_header('<f4', shape)
    member.write(head)
    for _ in range(_BOMB // 2**20):
      member.write(bytes(2**20))


def lying_sizes(random: Random, raw: bytes) -> bytes:
  """Other sizes in the central directory, which comes last."""
  changed = bytearray(raw)
  starts = [m.start() for m in re.finditer(b'PK\x01\x02', raw)]
  start = pick(random, starts)
  field = pick(random, [16, 20, 24, 28, 42])  # crc, sizes, name, offset
  struct.pack_into(
    '<I', changed, start + field, pick(random, mutations.LENGTHS[:7])
  )
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


def pickled(random: Random, raw: bytes) -> bytes:
  """Another pickle, or the same with code in its midst."""
  kind = random.integers(4)
  if kind == 0:
    return pickle.dumps(_Run('../escaped'), int(random.integers(2, 6)))
  if kind == 1:
    return pick(random, _OPCODES)
  if kind == 2:
    names = sorted(set(re.findall(rb'c([\w.]+\n\w+)\n', raw)))
    new = pick(random, [b'os\nsystem', b'builtins\neval', b'torch\nadd'])
    return raw.replace(pick(random, names), new) if names else raw
  at = int(random.integers(2, max(3, len(raw))))
  return raw[:at] + pick(random, _OPCODES)[:-1] + raw[at:]


def odd_state(random: Random, state: dict[str, Any]) -> Any:
  """A whole torch file that holds something unusual."""
  key = pick(random, list(state))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    odd = pick(
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
