"""Sums and products, of features or with constants."""

from typing import Any

import numpy as np

from clusterq_jax.importing.layer import per_channel
from clusterq_jax.importing.operators.registry import handles
from clusterq_jax.importing.translator import Feature, Translator


def affine(
  t: Translator, value: Feature, factor: Any = 1.0, shift: Any = 0.0
) -> Feature:
  """Returns value * factor + shift, with constants that torch broadcasts."""
  channels = value.layer.shape[0]
  arrays = {}
  for name, constant in (('factor', factor), ('shift', shift)):
    constant = np.asarray(constant)
    if constant.size != 1 and not value.is_map:
      t.refuse(
        f'it applies a constant of shape {list(constant.shape)} to a flattened '
        f'map {list(value.shape)}; apply it before the map is flattened'
      )
    vector = (
      np.full(channels, constant.reshape(()), np.float64)
      if constant.size == 1 and constant.ndim <= len(value.shape)
      else per_channel(constant, value.shape, channels)
    )
    if vector is None or not np.isfinite(vector).all():
      t.refuse(
        f'a constant of shape {list(constant.shape)} differs between pixels, '
        'or is not finite, and only one number per channel can be imported'
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
        f'it combines shapes {list(x.shape)} and {list(y.shape)}, and only '
        'equal shapes, or [N, C, H, W] with [N, C, 1, 1], can be imported'
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


@handles('add sub rsub')
def _sum(t: Translator) -> Feature:
  x, y = _operands(t)
  op, alpha = t.call.op.removesuffix('_'), t.number('alpha', 1)
  if op == 'rsub':
    x, y = y, x
  sign = alpha if op == 'add' else -alpha
  if not isinstance(y, Feature):
    return affine(t, x, shift=sign * np.asarray(y, np.float64))
  if not isinstance(x, Feature):
    return affine(t, y, sign, x)
  return _elementwise(t, 'add', x, y if sign == 1 else affine(t, y, sign))


@handles('mul')
def _product(t: Translator) -> Feature:
  x, y = _operands(t)
  if isinstance(x, Feature) and isinstance(y, Feature):
    return _elementwise(t, 'mul', x, y)
  return affine(t, x, y) if isinstance(x, Feature) else affine(t, y, x)


@handles('div')
def _quotient(t: Translator) -> Feature:
  x, y = _operands(t)
  if isinstance(y, Feature) or t.plain('rounding_mode') is not None:
    t.refuse('it divides by a tensor, or rounds, and neither can be imported')
  with np.errstate(all='ignore'):
    return affine(t, x, 1 / np.asarray(y, np.float64))


@handles('neg')
def _negative(t: Translator) -> Feature:
  return affine(t, t.feature(), -1.0)
