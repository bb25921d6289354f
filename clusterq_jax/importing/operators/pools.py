"""Pools, means, and nearest upsampling."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clusterq_jax.importing.layer import Layer, product
from clusterq_jax.importing.operators import padding
from clusterq_jax.importing.operators.registry import handles
from clusterq_jax.importing.translator import Feature, Translator


def _global_pool(t: Translator, x: Layer) -> Layer:
  if x.is_vector:
    return x
  return t.add('global_avg_pool', [x], (x.shape[0], 1, 1))


@handles('max_pool2d avg_pool2d max_pool2d_with_indices')
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
    x = padding.padded(t, x, [(p, p) for p in margins])
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
  # A step along an axis with one window does not matter.
  counts = [
    (size + sum(pair) - k) // s + 1
    for size, k, s, pair in zip(sides, kernel, steps, pads, strict=True)
  ]
  used = {s for s, count in zip(steps, counts, strict=True) if count > 1}
  # Without steps, one so large that no second window fits.
  strides = used.pop() if used else max(sides) + max(max(p) for p in pads)
  found = padding.window_sizes(t, sides, kernel, strides, pads)
  if used or found != counts:
    t.refuse(
      f'its stride differs between height and width {tuple(steps)}, and only '
      'equal ones can be imported'
    )
  options: dict[str, Any] = {'count_padding': True} if counted else {}
  return t.add(
    op,
    [x],
    (x.shape[0], *found),
    kernel=tuple(kernel),
    strides=strides,
    padding=tuple(pads),
    **options,
  )


@handles('adaptive_avg_pool2d adaptive_max_pool2d')
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
      f'it resizes {h}x{w} pixels to {sizes[0]}x{sizes[1]}, and only whole '
      'factors that are equal in both directions can be imported'
    )
  if factor == 1:
    layer = x
  else:
    shape = (c, h * factor, w * factor)
    layer = t.add('resize', [x], shape, factor=factor)
  return Feature(layer, (t.feature().shape[0], *layer.shape))


@handles('upsample_nearest2d')
def _upsample(t: Translator) -> Feature:
  shape = t.shape_of(t.call.outputs[0])
  if len(shape) != 4 or max(shape) > 2**15:
    t.refuse(f'its result is {list(shape)}')
  x = t.map()
  factors = t.plain('scale_factors')
  if factors is None:
    factors = [t.plain('scales_h'), t.plain('scales_w')]
  for factor, size, old in zip(factors, shape[2:], x.shape[1:], strict=True):
    # torch takes pixels by the factor, not by the size of the result.
    if factor is not None and factor != size / old:
      t.refuse(
        f'its factor is {factor}, and only whole factors that are equal in '
        'both directions can be imported'
      )
  return _repeated(t, x, shape[2:])


def _dims(t: Translator, rank: int) -> set[int]:
  dims = t.integers('dim', (), None)
  if not all(-rank <= dim < rank for dim in dims):
    t.refuse(f'its dim is {dims}, of {rank} axes')
  return {dim % rank for dim in dims}


@handles('mean amax')
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
      f'over the axes {sorted(dims)} of {list(value.shape)}, and only over '
      'height and width can it be imported'
    )
  if not shape or product(shape) != shape[0] * product(layer.shape):
    t.refuse(f'its result is {list(shape)}')
  return Feature(layer, shape)
