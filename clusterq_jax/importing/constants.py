"""Evaluates operators whose operands are all constants, in numpy.

Networks compute with weights before they meet an image: they standardise or
reshape kernels, and make tensors of zeros or of fixed numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clusterq_jax.importing.layer import product

_LARGEST = 2**25  # numbers in one constant
FLOATS = ('torch.float32', 'torch.float64', 'torch.float16', 'torch.bfloat16')


def _reshaped(values, shape, **_):
  return values.reshape(shape)


def _reduced(function):
  def reduce(values, o, shape, **_):
    dims = o.get('dim')
    axes = tuple(dims) if isinstance(dims, list) else dims
    return np.asarray(function(values, axis=axes)).reshape(shape)

  return reduce


def _variance(values, o, shape, **_):
  dims = o.get('dim')
  correction = o.get('correction', 1 if o.get('unbiased', True) else 0)
  axes = tuple(dims) if isinstance(dims, list) else dims
  return np.var(values, axis=axes, ddof=correction).reshape(shape)


def _added(values, o, sign=1, **_):
  return values + sign * o.get('alpha', 1) * o['other']


def _normalized(values, o, **_):
  """BatchNorm of a kernel: weight standardisation in disguise."""
  sides = (1, -1) + (1,) * (values.ndim - 2)
  if o.get('training'):
    axes = (0, *range(2, values.ndim))
    mean, var = values.mean(axes), values.var(axes)
  else:
    mean, var = o['running_mean'], o['running_var']
  result = (values - mean.reshape(sides)) / np.sqrt(
    var.reshape(sides) + o['eps']
  )
  for leaf, function in (('weight', np.multiply), ('bias', np.add)):
    if o.get(leaf) is not None:
      result = function(result, o[leaf].reshape(sides))
  return result


def _sliced(values, o, **_):
  steps = slice(o.get('start'), o.get('end'), o.get('step', 1))
  index = [slice(None)] * values.ndim
  index[o.get('dim', 0)] = steps
  return values[tuple(index)]


def _permuted(values, o, **_):
  return values.transpose(o['dims'])


def _swapped(values, o, **_):
  return values.swapaxes(o['dim0'], o['dim1'])


def _same(values, **_):
  return values


def _cast(values, o, **_):
  """A cast between floating-point types, all of which are float32 here."""
  other = o.get('other')
  if o.get('dtype') not in (None, *FLOATS) or (
    isinstance(other, np.ndarray) and other.dtype != values.dtype
  ):
    raise TypeError('a cast to another kind of number')
  return values


def _divided(values, o, **_):
  if o.get('rounding_mode') is not None:
    raise TypeError('a division that rounds')
  return np.divide(values, o['other'])


def _clamped(values, o, **_):
  return np.clip(values, o.get('min'), o.get('max'))


def _unary(function):
  return lambda values, **_: function(values)


def _binary(function):
  return lambda values, o, **_: function(values, o['other'])


def _filled(value):
  def fill(values=None, *, o, shape, **_):
    number = o.get('fill_value') if value is None else value
    return np.full(shape, number, np.float32)

  return fill


# Tensors of one number; of their operand, only the shape matters.
FILLS = {
  **dict.fromkeys(('zeros', 'zeros_like', 'new_zeros'), _filled(0)),
  **dict.fromkeys(('ones', 'ones_like', 'new_ones'), _filled(1)),
  **dict.fromkeys(('full', 'full_like', 'new_full'), _filled(None)),
}
# They broadcast their operands.
_BROADCASTS = frozenset(
  'add sub rsub mul div pow clamp clamp_min clamp_max'.split()
)
# Of their other operand, only the shape or the type matters.
LIKE = frozenset(('to', 'type_as', 'expand_as'))
_OPS: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(
    ('view reshape flatten squeeze unsqueeze _unsafe_view unflatten'.split()),
    _reshaped,
  ),
  **dict.fromkeys(
    (
      'clone detach contiguous alias lift_fresh_copy lift_fresh dropout'
    ).split(),
    _same,
  ),
  **dict.fromkeys(('to', '_to_copy', 'type_as', 'float'), _cast),
  **dict.fromkeys(
    ('expand', 'expand_as'),
    lambda values, shape, **_: np.broadcast_to(values, shape),
  ),
  'add': _added,
  'sub': lambda values, **o: _added(values, sign=-1, **o),
  'rsub': lambda values, o, **_: o['other'] - o.get('alpha', 1) * values,
  'mul': _binary(np.multiply),
  'div': _divided,
  'pow': lambda values, o, **_: np.power(values, o['exponent']),
  'neg': _unary(np.negative),
  'abs': _unary(np.abs),
  'exp': _unary(np.exp),
  'sqrt': _unary(np.sqrt),
  'rsqrt': _unary(lambda values: 1 / np.sqrt(values)),
  'reciprocal': _unary(lambda values: 1 / values),
  'sigmoid': _unary(lambda values: 1 / (1 + np.exp(-values))),
  'relu': _unary(lambda values: np.maximum(values, 0)),
  'clamp': _clamped,
  'clamp_min': _clamped,
  'clamp_max': _clamped,
  'mean': _reduced(np.mean),
  'sum': _reduced(np.sum),
  'var': _variance,
  'std': lambda values, **o: np.sqrt(_variance(values, **o)),
  'batch_norm': _normalized,
  'slice': _sliced,
  'permute': _permuted,
  'transpose': _swapped,
  't': lambda values, **_: values.T,
  'cat': lambda values, o, **_: np.concatenate(o['tensors'], o.get('dim', 0)),
  'stack': lambda values, o, **_: np.stack(o['tensors'], o.get('dim', 0)),
  **FILLS,
}


def evaluate(
  op: str, operands: Mapping[str, Any], shape: tuple[int, ...]
) -> np.ndarray | None:
  """Evaluates an operator.

  Args:
    op: name of the operator, without a final underscore.
    operands: by name; tensors as arrays.
    shape: shape of the result, as the program says.

  Returns:
    The result, or None if the operator is not known, fails, or gives another
    shape than the program says.
  """
  arrays = [
    array
    for value in operands.values()
    for array in (value if isinstance(value, list) else [value])
    if isinstance(array, np.ndarray)
  ]
  if op not in _OPS or sum(a.size for a in arrays) > _LARGEST:
    return None
  values = operands.get('self', operands.get('input'))
  try:
    if product(shape) > _LARGEST or _is_bomb(op, values, arrays):
      return None
    with np.errstate(all='ignore'):
      result = np.asarray(_OPS[op](values, o=operands, shape=shape))
  except Exception:  # operands of a damaged program can be anything
    return None
  return result if result.shape == tuple(shape) else None


def _is_bomb(op: str, values: Any, arrays: list[np.ndarray]) -> bool:
  """Tells whether an operator would broadcast its operands to too many."""
  if op == 'batch_norm':
    return any(a.size not in (1, *values.shape[1:2]) for a in arrays[1:])
  if op in _BROADCASTS:
    whole = np.broadcast_shapes(*(a.shape for a in arrays))
    return product(whole) > _LARGEST
  return False
