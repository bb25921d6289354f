"""Mutations of bytes and of JSON that know nothing of the file's format."""

from typing import Any

import numpy as np

Random = np.random.Generator


def pick(random: Random, choices):
  """Draws one of a sequence."""
  return choices[int(random.integers(len(choices)))]


LENGTHS = (0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**60, 2**64 - 1)


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
  value = pick(random, LENGTHS) % 256**width
  start = _place(random, len(raw))
  return raw[:start] + value.to_bytes(width, order) + raw[start + width :]


def damage(random: Random, raw: bytes) -> bytes:
  """One to three mutations that know nothing of the format."""
  mutations = (_flip, _truncate, _remove, _repeat, _length_field)
  for _ in range(random.integers(1, 4)):
    if raw:
      raw = pick(random, mutations)(random, raw)
  return raw


TEXTS = (
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
VALUES = (
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
  *TEXTS,
)


def change_json(random: Random, value: Any, depth: int = 0) -> Any:
  """Replaces, removes or adds something somewhere in a tree of JSON."""
  if isinstance(value, dict) and value and (depth == 0 or random.integers(4)):
    key = pick(random, sorted(value))
    changed = dict(value)
    action = random.integers(8)
    if action == 0:
      del changed[key]
    elif action == 1:
      changed[pick(random, TEXTS)] = changed.pop(key)
    else:
      changed[key] = change_json(random, value[key], depth + 1)
    return changed
  if isinstance(value, list) and value and random.integers(3):
    index = int(random.integers(len(value)))
    changed = change_json(random, value[index], depth + 1)
    return [*value[:index], changed, *value[index + 1 :]]
  if isinstance(value, str) and random.integers(2):
    return pick(random, TEXTS)  # safetensors' metadata are strings
  return pick(random, VALUES)
