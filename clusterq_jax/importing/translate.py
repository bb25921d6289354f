"""What each operator of torch becomes.

A handler reads the operands of the current call and appends layers. It refuses
what no layer computes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clusterq_jax.importing import refusals
from clusterq_jax.importing.layer import Layer, per_channel, product
from clusterq_jax.importing.program import Program
from clusterq_jax.importing.translator import (
  Feature,
  Handler,
  Translator,
  Value,
)

Pair = tuple[int, int]
_OPS: dict[str, Handler] = {}
_MOST_CROPPED = 16  # rows or columns; a crop becomes a kernel of that size


def _handles(names: str) -> Callable[[Handler], Handler]:
  def register(handler: Handler) -> Handler:
    _OPS.update(dict.fromkeys(names.split(), handler))
    return handler

  return register


def _output(layer: Layer, like: Feature) -> Feature:
  """Returns a layer's output, as a vector [N, C] if the input was one."""
  if layer.is_vector and len(like.shape) == 2:
    return Feature(layer, (like.shape[0], layer.shape[0]))
  return Feature(layer, (like.shape[0], *layer.shape))


@_handles('conv2d')
def _conv(t: Translator) -> Feature:
  x = t.map('input')
  weight = t.constant('weight')
  c, h, w = x.shape
  groups = t.integer('groups', 1)
  strides, dilation = t.one('stride', 1), t.one('dilation', 1)
  if weight is None or weight.ndim != 4 or len(t.feature('input').shape) != 4:
    t.refuse('only convolutions of images [N, C, H, W] can be imported')
  out, per_group, kh, kw = weight.shape
  if groups < 1 or per_group * groups != c or out % groups or not weight.size:
    t.refuse(f'its weight {list(weight.shape)} does not fit {c} channels')
  padding = t.plain('padding', 0)
  if padding in ('same', 'valid'):
    spans = [dilation * (k - 1) * (padding == 'same') for k in (kh, kw)]
    pads = [(n // 2, n - n // 2) for n in spans]
  else:
    pads = [(n, n) for n in t.integers('padding', (0, 0))]
  return _output(
    t.add(
      'conv',
      [x],
      (out, *_sizes(t, (h, w), (kh, kw), strides, pads, dilation)),
      {
        'kernel': weight.transpose(2, 3, 1, 0),
        'bias': _vector(t, 'bias', out, 0.0),
      },
      weight='weight',
      features=out,
      kernel=(kh, kw),
      strides=strides,
      padding=tuple(pads),
      dilation=dilation,
      groups=groups,
    ),
    t.feature('input'),
  )


def _sizes(t: Translator, sizes, kernel, strides, pads, dilation=1):
  """Returns height and width of what a window gives."""
  if min(n for pair in pads for n in pair) < 0:
    t.refuse('it has a negative padding')
  if max(*kernel, *(n for pair in pads for n in pair)) > 2**15:
    t.refuse('its window is too large')
  return [
    (size + sum(pair) - dilation * (k - 1) - 1) // strides + 1
    for size, k, pair in zip(sizes, kernel, pads, strict=True)
  ]


def _vector(t: Translator, name: str, size: int, default: float) -> np.ndarray:
  value = t.constant(name)
  if value is None:
    return np.full(size, default, np.float32)
  if value.shape != (size,):
    t.refuse(f'its {name} is {list(value.shape)}, expected [{size}]')
  return value


@_handles('linear')
def _linear(t: Translator) -> Feature:
  x, weight = t.feature('input'), t.constant('weight')
  c, h, w = x.layer.shape
  if len(x.shape) != 2 or x.shape[1] != c * h * w:
    t.refuse(
      f'it takes a tensor of shape {list(x.shape)}; only dense layers on '
      'vectors [N, C] can be imported'
    )
  if weight is None or weight.ndim != 2 or weight.shape[1] != c * h * w:
    t.refuse(f'its weight does not fit {c * h * w} numbers')
  out = len(weight)
  kernel = weight.reshape(out, c, h, w).transpose(2, 3, 1, 0)
  layer = t.add(
    'conv',
    [x.layer],
    (out, 1, 1),
    {'kernel': kernel, 'bias': _vector(t, 'bias', out, 0.0)},
    weight='weight',
    features=out,
    kernel=(h, w),
    padding=((0, 0), (0, 0)),
  )
  return Feature(layer, (x.shape[0], out))


@_handles('batch_norm')
def _batch_norm(t: Translator) -> Feature:
  x = t.map('input')
  size = x.shape[0]
  mean, var = t.constant('running_mean'), t.constant('running_var')
  if mean is None or var is None:
    t.refuse(
      'this BatchNorm keeps no statistics (track_running_stats=False); the '
      'method needs them: train it with statistics'
    )
  if t.plain('training', False):
    t.refuse(refusals.TRAINING)
  if (var < 0).any():
    t.refuse('its running variance is negative')
  epsilon = t.number('eps', 1e-5)
  if not 0 < epsilon < 1:
    t.refuse(f'its eps is {epsilon}, expected a small positive number')
  layer = t.add(
    'batch_norm',
    [x],
    x.shape,
    {
      'scale': _vector(t, 'weight', size, 1.0),
      'bias': _vector(t, 'bias', size, 0.0),
      'mean': _vector(t, 'running_mean', size, 0.0),
      'var': _vector(t, 'running_var', size, 1.0),
    },
    weight='running_mean',
    epsilon=epsilon,
  )
  return _output(layer, t.feature('input'))


# --- Activations -------------------------------------------------------------


def _act(t: Translator, act: str, value: Feature | None = None, **options):
  value = value or t.feature()
  layer = t.add('act', [value.layer], value.layer.shape, act=act, **options)
  return Feature(layer, value.shape)


for _name, _kind in {
  'relu': 'relu',
  'relu6': 'relu6',
  'hardswish': 'hard_swish',
  'hardsigmoid': 'hard_sigmoid',
  'sigmoid': 'sigmoid',
  'tanh': 'tanh',
}.items():
  _OPS[_name] = functools.partial(_act, act=_kind)


@_handles('silu')
def _silu(t: Translator) -> Feature:
  value = t.feature()
  gate = _act(t, 'sigmoid')
  layer = t.add('mul', [value.layer, gate.layer], value.layer.shape)
  return Feature(layer, value.shape)


@_handles('gelu')
def _gelu(t: Translator) -> Feature:
  tanh = t.plain('approximate', 'none') == 'tanh'
  return _act(t, 'gelu_tanh' if tanh else 'gelu')


@_handles('elu')
def _elu(t: Translator) -> Feature:
  if t.number('scale', 1) != 1 or t.number('input_scale', 1) != 1:
    t.refuse('a scaled elu (selu); use elu, or another activation')
  return _act(t, 'elu', slope=t.number('alpha', 1))


@_handles('leaky_relu')
def _leaky_relu(t: Translator) -> Feature:
  return _act(t, 'leaky_relu', slope=t.number('negative_slope', 0.01))


@_handles('prelu')
def _prelu(t: Translator) -> Feature:
  x = t.map()
  slope = t.constant('weight')
  if slope is None or slope.size not in (1, x.shape[0]):
    t.refuse(f'its weight does not fit {x.shape[0]} channels')
  slopes = np.broadcast_to(slope.reshape(-1), x.shape[:1])
  layer = t.add(
    'act', [x], x.shape, {'slope': slopes}, weight='weight', act='prelu'
  )
  return Feature(layer, t.feature().shape)


@_handles('hardtanh clamp clamp_min')
def _clip(t: Translator) -> Feature:
  op = t.call.op.removesuffix('_')
  ends = ('min_val', 'max_val') if op == 'hardtanh' else ('min', 'max')
  low, high = map(t.plain, ends)
  if low == 0 and high is None:
    return _act(t, 'relu')
  if op == 'hardtanh':
    low, high = t.number('min_val', -1), t.number('max_val', 1)
  if not (type(low) in (int, float) and type(high) in (int, float)):
    t.refuse(f'it clips to ({low!r:.20}, {high!r:.20}); it needs two numbers')
  if not 1e-6 < high - low < 1e6:
    t.refuse(f'it clips to ({low}, {high})')
  # Any other range is that of relu6, scaled and shifted.
  scale = (high - low) / 6
  x = t.feature() if low == 0 else _affine(t, t.feature(), shift=-low)
  x = x if scale == 1 else _affine(t, x, 1 / scale)
  x = _act(t, 'relu6', x)
  return x if (low, scale) == (0, 1) else _affine(t, x, scale, low)


# --- Arithmetic --------------------------------------------------------------


def _affine(
  t: Translator, value: Feature, factor: Any = 1.0, shift: Any = 0.0
) -> Feature:
  """Returns value * factor + shift, with constants that torch broadcasts."""
  channels = value.layer.shape[0]
  arrays = {}
  for name, constant in (('factor', factor), ('shift', shift)):
    constant = np.asarray(constant)
    if constant.size != 1 and not value.is_map:
      t.refuse(f'it meets a constant at the shape {list(value.shape)}')
    vector = (
      np.full(channels, constant.reshape(()), np.float64)
      if constant.size == 1 and constant.ndim <= len(value.shape)
      else per_channel(constant, value.shape, channels)
    )
    if vector is None or not np.isfinite(vector).all():
      t.refuse(
        f'a constant of shape {list(constant.shape)} differs between pixels, '
        'or is not finite; only one number per channel can be imported'
      )
    arrays[name] = vector
  layer = t.add('affine', [value.layer], value.layer.shape, arrays)
  return Feature(layer, value.shape)


def _elementwise(t: Translator, op: str, x: Feature, y: Feature) -> Feature:
  """Returns the sum or product of two features, one of them maybe a vector."""
  same = x.layer.shape == y.layer.shape and x.shape == y.shape
  if not same:
    large, small = (y, x) if x.layer.is_vector else (x, y)
    fits = (
      large.is_map
      and len(large.shape) == 4
      and small.layer.is_vector
      and small.shape[1:] in (small.layer.shape, large.shape[1:])
      and small.layer.shape[0] == large.layer.shape[0]
    )
    if not fits:
      t.refuse(
        f'it combines shapes {list(x.shape)} and {list(y.shape)}; only equal '
        'shapes, or [N, C, H, W] with [N, C, 1, 1], can be imported'
      )
    x, y = large, small
  layer = t.add(op, [x.layer, y.layer], x.layer.shape)
  return Feature(layer, x.shape)


def _operands(t: Translator) -> tuple[Any, Any]:
  x, y = t.operand('self'), t.operand('other')
  for value in (x, y):
    if not isinstance(value, (Feature, np.ndarray, int, float)):
      t.refuse(f'it takes {value!r:.40}, expected a tensor or a number')
  return x, y


@_handles('add sub rsub')
def _sum(t: Translator) -> Feature:
  x, y = _operands(t)
  op, alpha = t.call.op.removesuffix('_'), t.number('alpha', 1)
  if op == 'rsub':
    x, y = y, x
  sign = alpha if op == 'add' else -alpha
  if not isinstance(y, Feature):
    return _affine(t, x, shift=sign * np.asarray(y, np.float64))
  if not isinstance(x, Feature):
    return _affine(t, y, sign, x)
  return _elementwise(t, 'add', x, y if sign == 1 else _affine(t, y, sign))


@_handles('mul')
def _product(t: Translator) -> Feature:
  x, y = _operands(t)
  if isinstance(x, Feature) and isinstance(y, Feature):
    return _elementwise(t, 'mul', x, y)
  return _affine(t, x, y) if isinstance(x, Feature) else _affine(t, y, x)


@_handles('div')
def _quotient(t: Translator) -> Feature:
  x, y = _operands(t)
  if isinstance(y, Feature) or t.plain('rounding_mode') is not None:
    t.refuse('it divides by a tensor, or rounds; neither can be imported')
  with np.errstate(all='ignore'):
    return _affine(t, x, 1 / np.asarray(y, np.float64))


@_handles('neg')
def _negative(t: Translator) -> Feature:
  return _affine(t, t.feature(), -1.0)


# --- Pools -------------------------------------------------------------------


def _global_pool(t: Translator, x: Layer) -> Layer:
  if x.is_vector:
    return x
  return t.add('global_avg_pool', [x], (x.shape[0], 1, 1))


@_handles('max_pool2d avg_pool2d max_pool2d_with_indices')
def _pool(t: Translator) -> Feature:
  x = t.map()
  kernel = t.integers('kernel_size', ())
  steps = t.integers('stride', kernel)
  margins = t.integers('padding', (0, 0))
  if min(kernel + steps) < 1 or min(margins) < 0:
    t.refuse(f'its window is {kernel}, its stride {steps}')
  if t.one('dilation', 1) != 1:
    t.refuse('dilated pools cannot be imported')
  pads, extra = [], False
  for size, k, s, p in zip(x.shape[1:], kernel, steps, margins, strict=True):
    after = p
    if t.plain('ceil_mode', False):
      count = -(-(size + 2 * p - k) // s) + 1
      count -= (count - 1) * s >= size + p
      after = max(p, (count - 1) * s + k - size - p)
    pads.append((p, after))
    extra |= after > p
  is_max = t.call.op.startswith('max')
  counted = not is_max and bool(t.plain('count_include_pad', True))
  if not is_max and t.plain('divisor_override') is not None:
    t.refuse('its divisor_override cannot be imported')
  if counted and extra and any(margins):
    # The padding counts, what ceil_mode adds does not.
    x = _padded(t, x, [(p, p) for p in margins])
    pads = [(0, after - p) for (_, after), p in zip(pads, margins, strict=True)]
  counted = counted and not extra and any(margins)
  layer = _window(
    t, 'max_pool' if is_max else 'avg_pool', x, kernel, steps, pads, counted
  )
  return Feature(layer, (t.feature().shape[0], *layer.shape))


def _window(
  t: Translator, op: str, x: Layer, kernel, steps, pads, counted=False
) -> Layer:
  """Adds a pool; one window over the whole map is a global pool."""
  sides = x.shape[1:]
  if list(kernel) == [1, 1] and list(steps) == [1, 1]:
    return x
  if op == 'avg_pool' and tuple(kernel) == sides and not np.any(pads):
    return _global_pool(t, x)
  # A step along one row or column of windows does not matter.
  counts = [
    (size + sum(pair) - k) // s + 1
    for size, k, s, pair in zip(sides, kernel, steps, pads, strict=True)
  ]
  used = {s for s, count in zip(steps, counts, strict=True) if count > 1}
  if len(used) > 1:
    t.refuse(
      f'its stride differs between height and width {tuple(steps)}; only '
      'equal ones can be imported'
    )
  options: dict[str, Any] = {'count_padding': True} if counted else {}
  strides = used.pop() if used else 1
  if not used and max(counts) == 1:
    strides = max(strides, *kernel)  # so that no second window fits
  return t.add(
    op,
    [x],
    (x.shape[0], *_sizes(t, sides, kernel, strides, pads)),
    kernel=tuple(kernel),
    strides=strides,
    padding=tuple(pads),
    **options,
  )


@_handles('adaptive_avg_pool2d adaptive_max_pool2d')
def _adaptive_pool(t: Translator) -> Feature:
  x = t.map()
  wanted = t.integers('output_size', (1, 1))
  op = 'avg_pool' if 'avg' in t.call.op else 'max_pool'
  kernel, steps = [], []
  for size, count in zip(x.shape[1:], wanted, strict=True):
    if not 0 < count < 2**15:
      t.refuse(f'its output size is {wanted}')
    starts = [i * size // count for i in range(count)]
    sides = {-(-(i + 1) * size // count) - s for i, s in enumerate(starts)}
    gaps = {b - a for a, b in zip(starts, starts[1:], strict=False)}
    if len(sides) > 1 or len(gaps) > 1 or 0 in gaps:
      if all(
        n % size == 0 for n, size in zip(wanted, x.shape[1:], strict=True)
      ):
        return _repeated(t, x, wanted)
      t.refuse(
        f'its windows differ in size ({size} pixels to {count}); export with '
        'an image size for which they are equal'
      )
    kernel.append(sides.pop())
    steps.append(gaps.pop() if gaps else kernel[-1])
  layer = _window(t, op, x, kernel, steps, ((0, 0), (0, 0)))
  return Feature(layer, (t.feature().shape[0], *layer.shape))


def _repeated(t: Translator, x: Layer, sizes: Sequence[int]) -> Feature:
  """Adds nearest upsampling to (H, W)."""
  c, h, w = x.shape
  factor = max(sizes[0] // h, 1)
  if [h * factor, w * factor] != list(sizes):
    t.refuse(
      f'it resizes {h}x{w} pixels to {sizes[0]}x{sizes[1]}; only whole factors '
      'that are equal in both directions can be imported'
    )
  if factor == 1:
    layer = x
  else:
    shape = (c, h * factor, w * factor)
    layer = t.add('resize', [x], shape, factor=factor)
  return Feature(layer, (t.feature().shape[0], *layer.shape))


@_handles('upsample_nearest2d')
def _upsample(t: Translator) -> Feature:
  shape = t.shape_of(t.call.outputs[0])
  if len(shape) != 4 or max(shape) > 2**15:
    t.refuse(f'its result is {list(shape)}')
  return _repeated(t, t.map(), shape[2:])


def _dims(t: Translator, rank: int) -> set[int]:
  dims = t.integers('dim', (), None)
  if not all(-rank <= dim < rank for dim in dims):
    t.refuse(f'its dim is {dims}, of {rank} axes')
  return {dim % rank for dim in dims}


@_handles('mean amax')
def _mean(t: Translator) -> Feature:
  value = t.feature()
  x, dims = value.layer, _dims(t, len(value.shape))
  left = [n for i, n in enumerate(value.shape) if i not in dims]
  shape = t.shape_of(t.call.outputs[0])
  is_mean = t.call.op == 'mean'
  if product(left) == value.shape[0] * x.shape[0] and left[1:2] == [x.shape[0]]:
    if is_mean:
      layer = _global_pool(t, x)
    else:
      layer = _window(
        t, 'max_pool', x, x.shape[1:], x.shape[1:], ((0, 0), (0, 0))
      )
  elif value.is_map and dims in ({2}, {3}) and is_mean:
    kernel = (x.shape[1], 1) if dims == {2} else (1, x.shape[2])
    layer = _window(t, 'avg_pool', x, kernel, (1, 1), ((0, 0), (0, 0)))
  else:
    t.refuse(
      f'over the axes {sorted(dims)} of {list(value.shape)}; only over height '
      'and width can it be imported'
    )
  if product(shape) != shape[0] * product(layer.shape):
    t.refuse(f'its result is {list(shape)}')
  return Feature(layer, shape)


# --- Padding -----------------------------------------------------------------


def _padded(t: Translator, x: Layer, pads, value: float = 0.0) -> Layer:
  c, h, w = x.shape
  (top, bottom), (left, right) = pads
  shape = (c, h + top + bottom, w + left + right)
  if max(shape[1:]) > 2**15:
    t.refuse(f'its result is {list(shape)}')
  return t.add('pad', [x], shape, padding=tuple(pads), value=value)


@_handles('pad constant_pad_nd')
def _pad(t: Translator) -> Feature:
  value, x = t.feature(), t.map()
  pads = t.integers('pad', (), None)
  mode = t.plain('mode', 'constant')
  if mode != 'constant':
    t.refuse(f'padding of mode {mode!r:.20}; only zeros can be imported')
  if len(pads) % 2 or len(pads) > 8 or len(value.shape) != 4:
    t.refuse(f'its pad is {pads}')
  fill = t.plain('value')
  fill = 0.0 if fill is None else fill
  # torch counts axes from the last.
  pairs = list(zip(pads[::2], pads[1::2], strict=True))
  pairs += [(0, 0)] * (4 - len(pairs))
  horizontal, vertical, channels, batch = pairs
  if batch != (0, 0) or type(fill) not in (int, float):
    t.refuse(f'its pad is {pads} with {fill!r:.20}')
  if min(*vertical, *horizontal, *channels) < 0:
    if max(*vertical, *horizontal, *channels) > 0 or channels != (0, 0):
      t.refuse(f'it pads and crops at once: {pads}')
    (top, bottom), (left, right) = vertical, horizontal
    return _cropped(t, value, (-top, -bottom), (-left, -right))
  if vertical != (0, 0) or horizontal != (0, 0):
    x = _padded(t, x, (vertical, horizontal), fill)
  if channels != (0, 0):
    if fill != 0:
      t.refuse(f'it pads channels with {fill}; only zeros can be imported')
    x = _more_channels(t, x, *channels)
  return Feature(x, (value.shape[0], *x.shape))


def _more_channels(t: Translator, x: Layer, before: int, after: int) -> Layer:
  c, h, w = x.shape
  if c + before + after > 2**20:
    t.refuse(f'{c + before + after} channels')
  shape = (c + before + after, h, w)
  return t.add('pad_channels', [x], shape, before=before, after=after)


# --- Channels ----------------------------------------------------------------


@_handles('cat')
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
      f'{list(features[0].shape)}; only over channels, axis 1, can it be '
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
  layer = _more_channels(t, x.layer, *counts)
  return Feature(layer, (x.shape[0], *layer.shape))


def _part(t: Translator, value: Feature, start: int, stop: int) -> Feature:
  """Returns the places from start to before stop of axis 1."""
  c, h, w = value.layer.shape
  if len(value.shape) < 2 or product(value.shape[1:]) != c * h * w:
    t.refuse(f'it takes a part of {list(value.shape)}')
  numbers = product(value.shape[2:])
  if not 0 <= start < stop <= value.shape[1] or numbers % (h * w):
    t.refuse(
      f'it takes {start} to {stop} of axis 1 of {list(value.shape)}; only '
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


@_handles('chunk split split_with_sizes')
def _chunk(t: Translator) -> list[Feature]:
  value = t.feature()
  if _axis(t, value) != 1:
    t.refuse('it splits another axis than that of channels')
  size = value.shape[1]
  if t.call.op == 'chunk':
    step = -(-size // max(t.integer('chunks', 1), 1))
    sizes = [step] * (size // step) + [size % step] * (size % step > 0)
  elif isinstance(t.plain('split_size'), int):
    step = max(t.integer('split_size', 1), 1)
    sizes = [step] * (size // step) + [size % step] * (size % step > 0)
  else:
    sizes = t.integers(
      'split_sizes' if 'split_sizes' in t.call.operands else 'split_size',
      (),
      None,
    )
  if sum(sizes) != size or min(sizes, default=0) < 1 or len(sizes) > 4096:
    t.refuse(f'it splits {size} channels into {sizes!r:.60}')
  starts = np.cumsum([0, *sizes]).tolist()
  return [
    _part(t, value, a, b) for a, b in zip(starts, starts[1:], strict=False)
  ]


@_handles('slice')
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
    return _cropped(t, value, vertical, horizontal)
  t.refuse(
    f'it takes {start} to {stop} in steps of {step} of axis {axis} of '
    f'{list(value.shape)}; only ranges of channels, rows or columns, and every '
    'n-th row and column from the first on, can be imported'
  )


def _cropped(
  t: Translator, value: Feature, vertical: Pair, horizontal: Pair
) -> Feature:
  """Takes rows and columns off the map: (before, after) of each."""
  x = value.layer
  if x.op == 'crop':
    # Of one crop after another, the first will have no reader.
    vertical, horizontal = (
      (a + c, b + d)
      for (a, b), (c, d) in zip(
        x.options['margins'], (vertical, horizontal), strict=True
      )
    )
    (x,) = x.inputs
  c, h, w = x.shape
  shape = (c, h - sum(vertical), w - sum(horizontal))
  if max(sum(vertical), sum(horizontal)) > _MOST_CROPPED:
    t.refuse(
      f'it crops {h}x{w} pixels to {shape[1]}x{shape[2]}; only up to '
      f'{_MOST_CROPPED} rows and columns can be cropped'
    )
  layer = t.add('crop', [x], shape, margins=(vertical, horizontal))
  return Feature(layer, (value.shape[0], *shape))


@_handles('select')
def _select(t: Translator) -> Feature:
  value = t.feature()
  index = t.integer('index', 0)
  if _axis(t, value) != 1:
    t.refuse('it takes a place of another axis than that of channels')
  index += value.shape[1] * (index < 0)
  part = _part(t, value, index, index + 1)
  return Feature(part.layer, (part.shape[0], *part.shape[2:]))


@_handles('unbind')
def _unbind(t: Translator) -> list[Feature]:
  value = t.feature()
  if _axis(t, value) != 1 or value.shape[1] > 4096:
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


@_handles('channel_shuffle native_channel_shuffle')
def _channel_shuffle(t: Translator) -> Feature:
  t.map()
  value = t.feature()
  return Feature(_shuffled(t, value, t.integer('groups', 1)), value.shape)


@_handles('transpose permute')
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
  groups, n = value.shape[1:3]
  swaps = order == [0, 2, 1, *range(3, rank)]
  if swaps and groups * n == c and product(value.shape[3:]) == h * w:
    return Feature(_shuffled(t, value, groups), shape)
  t.refuse(
    f'it reorders the axes of {list(value.shape)} to {order}; only channel '
    'shuffles [N, groups, n, H, W] to [N, n, groups, H, W] can be imported'
  )


# --- Shapes ------------------------------------------------------------------


@_handles('view reshape flatten squeeze unsqueeze unflatten _unsafe_view')
def _reshape(t: Translator) -> Feature:
  return t.reshaped(t.feature(), t.call.outputs[0])


@_handles('expand expand_as')
def _expand(t: Translator) -> Feature:
  value = t.feature()
  shape = t.shape_of(t.call.outputs[0])
  if shape == value.shape:
    return value
  if (
    value.layer.is_vector
    and len(shape) == 4
    and shape[:2] == value.shape[:2]
    and value.shape[1:] == value.layer.shape
  ):
    return Feature(value.layer, shape)
  t.refuse(
    f'it expands {list(value.shape)} to {list(shape)}; only vectors '
    '[N, C, 1, 1] can be expanded'
  )


@_handles('dropout feature_dropout alpha_dropout feature_alpha_dropout')
def _dropout(t: Translator) -> Feature:
  if t.plain('train', False):
    t.refuse(refusals.TRAINING)
  return t.feature()


@_handles(
  'clone contiguous detach alias lift_fresh_copy to _to_copy type_as float'
)
def _identity(t: Translator) -> Feature:
  return t.feature()


def translate(program: Program) -> list[Layer]:
  """Translates a program.

  Args:
    program: the program.

  Returns:
    Layers in forward order; the first is the input, the last an 'output'.

  Raises:
    InputError: it computes something that no layer does, or it is not a
      function from images to logits.
  """
  return Translator(program, _OPS).run()
