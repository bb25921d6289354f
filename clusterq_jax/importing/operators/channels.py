"""Concatenation, parts, and the order of channels."""

import numpy as np

from clusterq_jax.importing.layer import Layer, product
from clusterq_jax.importing.operators import padding
from clusterq_jax.importing.operators.registry import handles
from clusterq_jax.importing.translator import Feature, Translator, Value

_MOST_PARTS = 4096  # of one split


@handles('cat')
def _cat(t: Translator) -> Feature:
  values = t.operand('tensors')
  if not isinstance(values, list) or not all(
    isinstance(v, (Feature, np.ndarray)) for v in values
  ):
    t.refuse('it takes something else than a list of tensors')
  features = [v for v in values if isinstance(v, Feature)]
  rank = len(features[0].shape)
  if t.integer('dim', 0) not in (1, 1 - rank):
    t.refuse(
      f'over the axis {t.integer("dim", 0)} of tensors '
      f'{list(features[0].shape)}, and only over channels, axis 1, can it be '
      'imported'
    )
  batch = features[0].shape[0]
  sizes = {v.layer.shape[1:] for v in features}
  ranks = {len(v.shape) for v in features}
  if len(sizes) > 1 or len(ranks) > 1 or not all(v.is_map for v in features):
    shapes = ', '.join(str(list(v.shape)) for v in features[:6])
    t.refuse(f'it joins tensors of shapes {shapes}')
  if len(features) == 1 and len(values) > 1:
    return _cat_zeros(t, values, features[0])
  if len(features) != len(values):
    t.refuse('it joins features with a constant')
  layers = [v.layer for v in features]
  if len(layers) == 1:
    return features[0]
  (size,) = sizes
  channels = sum(layer.shape[0] for layer in layers)
  layer = t.add('concat', layers, (channels, *size))
  return Feature(layer, (batch, channels, *features[0].shape[2:]))


def _cat_zeros(t: Translator, values: list[Value], x: Feature) -> Feature:
  """Adds channels of zeros: a shortcut without parameters."""
  counts, at = [0, 0], 0
  for value in values:
    if isinstance(value, Feature):
      at = 1
    elif value.ndim != 4 or value.any() or value.shape[2:] != x.shape[2:]:
      t.refuse('it joins features with a constant that is not zero')
    else:
      counts[at] += value.shape[1]
  layer = padding.more_channels(t, x.layer, *counts)
  return Feature(layer, (x.shape[0], *layer.shape))


def _part(t: Translator, value: Feature, start: int, stop: int) -> Feature:
  """Returns the places from start to before stop of axis 1."""
  c, h, w = value.layer.shape
  if len(value.shape) < 2 or product(value.shape[1:]) != c * h * w:
    t.refuse(f'it takes a part of {list(value.shape)}')
  numbers = product(value.shape[2:])
  if not 0 <= start < stop <= value.shape[1] or numbers % (h * w):
    t.refuse(
      f'it takes {start} to {stop} of axis 1 of {list(value.shape)}, and only '
      'parts that are whole channels can be imported'
    )
  shape = (value.shape[0], stop - start, *value.shape[2:])
  if stop - start == value.shape[1]:
    return value
  unit = numbers // (h * w)
  start, stop = start * unit, stop * unit
  layer = t.add(
    'slice', [value.layer], (stop - start, h, w), start=start, stop=stop
  )
  return Feature(layer, shape)


def _axis(t: Translator, value: Feature) -> int:
  rank = len(value.shape)
  axis = t.integer('dim', 0)
  if not -rank <= axis < rank:
    t.refuse(f'its dim is {axis}, of {rank} axes')
  return axis % rank


def _equal(t: Translator, size: int, step: int) -> list[int]:
  """Returns the sizes of parts of `step` channels; the last may be smaller."""
  if size // step > _MOST_PARTS:
    t.refuse(f'it splits {size} channels into parts of {step}')
  return [step] * (size // step) + [size % step] * (size % step > 0)


@handles('chunk split split_with_sizes')
def _chunk(t: Translator) -> list[Feature]:
  value = t.feature()
  if _axis(t, value) != 1:
    t.refuse('it splits another axis than that of channels')
  size = value.shape[1]
  if t.call.op == 'chunk':
    sizes = _equal(t, size, -(-size // max(t.integer('chunks', 1), 1)))
  elif isinstance(t.plain('split_size'), int):
    sizes = _equal(t, size, max(t.integer('split_size', 1), 1))
  else:
    sizes = t.integers(
      'split_sizes' if 'split_sizes' in t.call.operands else 'split_size',
      (),
      None,
    )
  if (
    sum(sizes) != size or min(sizes, default=0) < 1 or len(sizes) > _MOST_PARTS
  ):
    t.refuse(f'it splits {size} channels into {sizes!r:.60}')
  starts = np.cumsum([0, *sizes]).tolist()
  return [
    _part(t, value, a, b) for a, b in zip(starts, starts[1:], strict=False)
  ]


@handles('slice')
def _slice(t: Translator) -> Feature:
  value = t.feature()
  axis, step = _axis(t, value), t.integer('step', 1)
  size = value.shape[axis]
  begin, end = t.plain('start'), t.plain('end')
  for place in (begin, end, step):
    if place is not None and (type(place) is not int or abs(place) > 2**63):
      t.refuse(f'it takes {begin!r:.20} to {end!r:.20}')
  if step < 1:
    t.refuse(f'its step is {step}')
  start, stop, _ = slice(begin, end, step).indices(size)
  if (start, stop, step) == (0, size, 1):
    return value
  if axis == 1 and step == 1:
    return _part(t, value, start, stop)
  if axis in (2, 3) and start == 0 and stop == size and value.is_map:
    c, h, w = value.layer.shape
    steps = (step, 1) if axis == 2 else (1, step)
    shape = (c, -(-h // steps[0]), -(-w // steps[1]))
    layer = t.add('subsample', [value.layer], shape, steps=steps)
    return Feature(layer, (value.shape[0], *shape))
  if axis in (2, 3) and step == 1 and value.is_map:
    margin = (start, size - stop)
    vertical, horizontal = (margin, (0, 0)) if axis == 2 else ((0, 0), margin)
    return padding.cropped(t, value, vertical, horizontal)
  t.refuse(
    f'it takes {start} to {stop} in steps of {step} of axis {axis} of '
    f'{list(value.shape)}, and only ranges of channels, rows or columns, and '
    'every n-th row and column from the first on, can be imported'
  )


@handles('select')
def _select(t: Translator) -> Feature:
  value = t.feature()
  index = t.integer('index', 0)
  if _axis(t, value) != 1:
    t.refuse('it takes a place of another axis than that of channels')
  index += value.shape[1] * (index < 0)
  part = _part(t, value, index, index + 1)
  return Feature(part.layer, (part.shape[0], *part.shape[2:]))


@handles('unbind')
def _unbind(t: Translator) -> list[Feature]:
  value = t.feature()
  if _axis(t, value) != 1 or value.shape[1] > _MOST_PARTS:
    t.refuse('it takes another axis apart than that of channels')
  parts = [_part(t, value, i, i + 1) for i in range(value.shape[1])]
  return [Feature(p.layer, (p.shape[0], *p.shape[2:])) for p in parts]


def _shuffled(t: Translator, value: Feature, groups: int) -> Layer:
  shape = value.layer.shape
  if groups < 1 or shape[0] % groups:
    t.refuse(f'{groups} groups of {shape[0]} channels')
  if groups in (1, shape[0]):
    return value.layer
  return t.add('shuffle', [value.layer], shape, groups=groups)


@handles('channel_shuffle native_channel_shuffle')
def _channel_shuffle(t: Translator) -> Feature:
  t.map()
  value = t.feature()
  return Feature(_shuffled(t, value, t.integer('groups', 1)), value.shape)


@handles('transpose permute')
def _permute(t: Translator) -> Feature:
  value = t.feature()
  rank = len(value.shape)
  if t.call.op == 'transpose':
    order = list(range(rank))
    i, j = (t.integer(f'dim{k}', 0) for k in (0, 1))
    if not (-rank <= i < rank and -rank <= j < rank):
      t.refuse(f'it swaps the axes {i} and {j} of {rank}')
    order[i], order[j] = order[j], order[i]
  else:
    order = [axis % rank for axis in t.integers('dims', (), None)]
  if sorted(order) != list(range(rank)):
    t.refuse(f'its order of axes is {order}')
  shape = tuple(value.shape[axis] for axis in order)
  moved = [axis for axis in order if value.shape[axis] > 1 or axis == 0]
  if moved == sorted(moved):
    return Feature(value.layer, shape)
  c, h, w = value.layer.shape
  if order == [0, 2, 1, *range(3, rank)]:
    groups, n, *sides = value.shape[1:]
    if groups * n == c and product(sides) == h * w:
      return Feature(_shuffled(t, value, groups), shape)
  t.refuse(
    f'it reorders the axes of {list(value.shape)} to {order}, and only channel '
    'shuffles [N, groups, n, H, W] to [N, n, groups, H, W] can be imported'
  )
