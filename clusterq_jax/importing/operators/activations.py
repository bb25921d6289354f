"""Activations, and clipping to any range."""

import functools

import numpy as np

from clusterq_jax.importing.operators import arithmetic
from clusterq_jax.importing.operators.registry import HANDLERS, handles
from clusterq_jax.importing.translator import Feature, Translator


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
  HANDLERS[_name] = functools.partial(_act, act=_kind)


@handles('silu')
def _silu(t: Translator) -> Feature:
  value = t.feature()
  gate = _act(t, 'sigmoid')
  layer = t.add('mul', [value.layer, gate.layer], value.layer.shape)
  return Feature(layer, value.shape)


@handles('gelu')
def _gelu(t: Translator) -> Feature:
  tanh = t.plain('approximate', 'none') == 'tanh'
  return _act(t, 'gelu_tanh' if tanh else 'gelu')


@handles('elu')
def _elu(t: Translator) -> Feature:
  if t.number('scale', 1) != 1 or t.number('input_scale', 1) != 1:
    t.refuse('a scaled elu (selu); use elu, or another activation')
  return _act(t, 'elu', slope=t.number('alpha', 1))


@handles('leaky_relu')
def _leaky_relu(t: Translator) -> Feature:
  return _act(t, 'leaky_relu', slope=t.number('negative_slope', 0.01))


@handles('prelu')
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


@handles('hardtanh clamp clamp_min')
def _clip(t: Translator) -> Feature:
  op = t.call.op.removesuffix('_')
  ends = ('min_val', 'max_val') if op == 'hardtanh' else ('min', 'max')
  low, high = map(t.plain, ends)
  if low == 0 and high is None and op != 'hardtanh':
    return _act(t, 'relu')
  if op == 'hardtanh':
    low, high = t.number('min_val', -1), t.number('max_val', 1)
  if not (type(low) in (int, float) and type(high) in (int, float)):
    t.refuse(f'it clips to ({low!r:.20}, {high!r:.20}), expected two numbers')
  if not 1e-6 < high - low < 1e6:
    t.refuse(f'it clips to ({low}, {high})')
  # Any other range is that of relu6, scaled and shifted.
  scale = (high - low) / 6
  x = t.feature() if low == 0 else arithmetic.affine(t, t.feature(), shift=-low)
  x = x if scale == 1 else arithmetic.affine(t, x, 1 / scale)
  x = _act(t, 'relu6', x)
  return x if (low, scale) == (0, 1) else arithmetic.affine(t, x, scale, low)
