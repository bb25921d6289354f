"""Other views of the same numbers."""

import numpy as np

from clusterq_jax.importing import constants, refusals
from clusterq_jax.importing.operators.registry import handles
from clusterq_jax.importing.translator import Feature, Translator


@handles('view reshape flatten squeeze unsqueeze unflatten _unsafe_view')
def _reshape(t: Translator) -> Feature:
  return t.reshaped(t.feature(), t.call.outputs[0])


@handles('expand expand_as')
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
    f'it expands {list(value.shape)} to {list(shape)}, and only vectors '
    '[N, C, 1, 1] can be expanded'
  )


@handles('dropout feature_dropout alpha_dropout feature_alpha_dropout')
def _dropout(t: Translator) -> Feature:
  if t.plain('train', False):
    t.refuse(refusals.TRAINING)
  return t.feature()


@handles(
  'clone contiguous detach alias lift_fresh_copy to _to_copy type_as float'
)
def _identity(t: Translator) -> Feature:
  kind, other = t.plain('dtype'), t.operand('other')
  if isinstance(kind, str) and kind not in constants.FLOATS:
    t.refuse(f'it casts to {kind:.20}, and only floating-point types are known')
  if isinstance(other, np.ndarray) and other.dtype.kind != 'f':
    t.refuse(
      f'it casts to {other.dtype}, and only floating-point types are known'
    )
  return t.feature()
