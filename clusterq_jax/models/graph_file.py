"""Writes graphs as JSON and reads them back, from files that anyone made.

    {"version": 1,
     "image_shape": [224, 224, 3],
     "nodes": [{"name": "input", "op": "input", "inputs": []},
               {"name": "stem", "op": "conv_bn", "inputs": ["input"],
                "features": 32, "kernel": [3, 3], "strides": 2}, ...]}

`image_shape` is null for networks that take any size. A node holds only the
fields that differ from their defaults. Reading checks everything: it runs no
code, and the cost is bounded by the limits below.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from flax import linen as nn

from clusterq_jax.errors import InputError
from clusterq_jax.models import protocol
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.node import OPTIONS, Node
from clusterq_jax.ops import convolution

VERSION = 1
_MOST_TEXT = 2**24  # characters
_MOST_NODES = 10_000
_LARGEST = 2**20  # of any size in pixels or channels
_MOST_VALUES = 2**31  # numbers in a layer's padded input, output or weights
_LEAST_EPSILON = 1e-12
# A layer's name is an attribute of the Linen module.
_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}')
RESERVED = frozenset(dir(nn.Module)) | {
  'graph',
  'layers',
  'name',
  'parent',
  'scope',
}

_DEFAULTS = {
  f.name: f.default
  for f in dataclasses.fields(Node)
  if f.default is not dataclasses.MISSING
}
_COUNTS = ('features', 'strides', 'dilation', 'groups', 'stop', 'factor')
_ARITY = {'input': (0, 0), 'add': (2, 2), 'mul': (2, 2), 'concat': (1, 4096)}
_ACTIVATIONS = typing.get_args(protocol.Activation)
_REQUIRED = {
  'conv_bn': ('features',),
  'conv': ('features',),
  'dense': ('features',),
  'act': ('act',),
  'slice': ('stop',),
  'pad_shortcut': ('features',),
}


def to_json(graph: Graph) -> str:
  """Returns a graph as JSON."""
  nodes = []
  for node in graph.nodes:
    own = {'name': node.name, 'op': node.op, 'inputs': node.inputs}
    for key in OPTIONS[node.op]:
      value = getattr(node, key)
      if value != _DEFAULTS[key]:
        own[key] = value
    nodes.append(own)
  whole = {
    'version': VERSION,
    'image_shape': graph.image_shape,
    'nodes': nodes,
  }
  return json.dumps(whole, separators=(',', ':'))


def from_json(text: str) -> Graph:
  """Reads and checks a graph.

  Args:
    text: result of `to_json`, or anything.

  Raises:
    InputError: the text is no graph that this version can run.
  """
  if len(text) > _MOST_TEXT:
    _refuse(f'has {len(text)} characters', f'at most {_MOST_TEXT}')
  try:
    whole = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise InputError(f'graph: expected JSON ({e})') from e
  if not isinstance(whole, dict) or whole.get('version') != VERSION:
    found = whole.get('version') if isinstance(whole, dict) else whole
    _refuse(f'has version {str(found)[:50]!r}', str(VERSION))
  nodes = whole.get('nodes')
  if not isinstance(nodes, list) or not 2 <= len(nodes) <= _MOST_NODES:
    count = len(nodes) if isinstance(nodes, list) else 'no list of'
    _refuse(f'has {count} nodes', f'2 to {_MOST_NODES}')
  seen: set[str] = set()
  read = []
  for raw in nodes:
    node = _node(raw, seen)
    seen.add(node.name)
    read.append(node)
  _check_ends(read)
  graph = Graph(tuple(read), _image_shape(whole.get('image_shape')))
  if graph.image_shape is not None:
    check_shapes(graph, graph.image_shape)
  return graph


def check_shapes(graph: Graph, image_shape: tuple[int, int, int]) -> None:
  """Refuses a graph whose layers cannot take images of a shape.

  Args:
    graph: the graph.
    image_shape: (H, W, C) of the images.

  Raises:
    InputError: a layer does not fit its inputs, or is absurdly large.
  """
  try:
    shapes = graph.shapes(image_shape)
    variables = graph.variable_shapes(image_shape)
  except ValueError as e:
    raise InputError(f'graph: {e}') from e
  for node in graph.nodes:
    h, w, c = shapes[node.name]
    if h * w * c > _MOST_VALUES:
      _refuse(
        f'{node.name} has an output of {h}x{w}x{c}', f'{_MOST_VALUES} values'
      )
    if 'kernel' in node.options:
      h, w, c = shapes[node.inputs[0]]
      pads = convolution.explicit(
        (h, w), node.kernel, node.strides, node.padding, node.dilation
      )
      h, w = h + sum(pads[0]), w + sum(pads[1])
      if h * w * c > _MOST_VALUES:
        _refuse(f'{node.name} pads to {h}x{w}x{c}', f'{_MOST_VALUES} values')
      sides = zip(pads, node.kernel, strict=True)
      if 'pool' in node.op and any(max(pad) >= side for pad, side in sides):
        _refuse(f'{node.name} pads by {pads}', 'less than its window')
  for name, leaves in variables['params'].items():
    size = 1
    for side in leaves.get('kernel', ()):
      size *= side
    if size > _MOST_VALUES:
      _refuse(f'{name} has {size} weights', f'at most {_MOST_VALUES}')


def _refuse(found: str, expected: str) -> NoReturn:
  raise InputError(f'graph: {found}, expected {expected}')


def _is_count(value: Any, least: int = 1) -> bool:
  return (
    isinstance(value, int)
    and not isinstance(value, bool)
    and least <= value <= _LARGEST
  )


def _image_shape(raw: Any) -> tuple[int, int, int] | None:
  if raw is None:
    return None
  if not isinstance(raw, list) or len(raw) != 3 or not all(map(_is_count, raw)):
    _refuse(f'image_shape={str(raw)[:50]}', 'height, width and channels')
  return raw[0], raw[1], raw[2]


def _node(raw: Any, seen: set[str]) -> Node:
  """Checks one node; `seen` has the names of the nodes before it."""
  if not isinstance(raw, dict):
    _refuse(f'a node is {str(raw)[:50]!r}', 'an object')
  name, op, inputs = (raw.get(key) for key in ('name', 'op', 'inputs'))
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    _refuse(
      f'a node is called {str(name)[:50]!r}',
      'letters, digits, dots, hyphens and underscores, at most 200',
    )
  if name in seen:
    _refuse(f'a second node is called {name!r}', 'another name')
  if name in RESERVED:
    _refuse(f'a node is called {name!r}, which is reserved', 'another name')
  if not isinstance(op, str) or op not in OPTIONS:
    _refuse(f'{name} has op {str(op)[:50]!r}', f'one of {", ".join(OPTIONS)}')
  if not isinstance(inputs, list):
    _refuse(f'{name} has inputs {str(inputs)[:50]!r}', 'a list of names')
  least, most = _ARITY.get(op, (1, 1))
  if not least <= len(inputs) <= most:
    _refuse(f'{op} {name} has {len(inputs)} inputs', f'{least} to {most}')
  for source in inputs:
    if not isinstance(source, str) or source not in seen:
      _refuse(
        f'{name} reads {str(source)[:50]!r}', 'the name of a node before it'
      )
  options = {k: v for k, v in raw.items() if k not in ('name', 'op', 'inputs')}
  for key in options.keys() - set(OPTIONS[op]):
    _refuse(f'{op} {name} has a field {key[:50]!r}', ', '.join(OPTIONS[op]))
  for key in _REQUIRED.get(op, ()):
    if key not in options:
      _refuse(f'{op} {name} has no {key}', 'one')
  checked = {key: _option(name, op, key, options[key]) for key in options}
  return Node(name, op, tuple(inputs), **checked)


def _option(name: str, op: str, key: str, value: Any) -> Any:
  """Checks one field of a node and returns it; lists become tuples."""

  def refuse(expected: str) -> NoReturn:
    _refuse(f'{op} {name}: {key}={str(value)[:50]!r}', expected)

  if key in _COUNTS:
    if not _is_count(value):
      refuse(f'an integer from 1 to {_LARGEST}')
  elif key == 'start':
    if not _is_count(value, 0):
      refuse('the index of a channel')
  elif key == 'act':
    allowed = _ACTIVATIONS if op == 'act' else protocol.CLIPPING
    if value not in allowed:
      refuse(f'one of {", ".join(allowed)}')
  elif key == 'kernel':
    if not isinstance(value, list) or len(value) != 2:
      refuse('height and width')
    if not all(map(_is_count, value)):
      refuse('height and width in pixels')
    return tuple(value)
  elif key == 'padding':
    return _padding(value, refuse)
  elif key == 'count_padding':
    if not isinstance(value, bool):
      refuse('true or false')
  elif key in ('epsilon', 'slope'):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= 1e6:
      refuse('a small number')
    if key == 'epsilon' and value < _LEAST_EPSILON:
      refuse(f'a number of at least {_LEAST_EPSILON}')
    return float(value)
  return value


def _padding(value: Any, refuse: Callable[[str], NoReturn]) -> protocol.Padding:
  if value == 'same' or value is None:
    return value
  if _is_count(value, 0):
    return value
  if (
    isinstance(value, list)
    and len(value) == 2
    and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    and all(_is_count(pixels, 0) for pair in value for pixels in pair)
  ):
    (top, bottom), (left, right) = value
    return (top, bottom), (left, right)
  refuse("'same', pixels, or [[top, bottom], [left, right]]")


def _check_ends(nodes: list[Node]) -> None:
  """Refuses a graph without one input first and one classifier last."""
  for op, place in (('input', nodes[0]), ('dense', nodes[-1])):
    found = [node.name for node in nodes if node.op == op]
    if found != [place.name]:
      where = 'first' if op == 'input' else 'last'
      _refuse(
        f'has the {op} nodes {", ".join(found[:5]) or "(none)"}',
        f'exactly one, the {where} node',
      )
  if not any(node.op == 'conv_bn' for node in nodes):
    _refuse('has no BatchNorm', 'at least one')
  read = {name for node in nodes for name in node.inputs}
  for node in nodes[:-1]:
    if node.name not in read:
      _refuse(f'nothing reads {node.name}', 'a reader of each node')
