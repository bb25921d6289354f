"""Convolutions, dense layers, and BatchNorm."""

import numpy as np

from clusterq_jax.importing import refusals
from clusterq_jax.importing.layer import Layer
from clusterq_jax.importing.operators import padding
from clusterq_jax.importing.operators.registry import handles
from clusterq_jax.importing.translator import Feature, Translator


def output(layer: Layer, like: Feature) -> Feature:
  """Returns a layer's output, as a vector [N, C] if the input was one."""
  if layer.is_vector and len(like.shape) == 2:
    return Feature(layer, (like.shape[0], layer.shape[0]))
  return Feature(layer, (like.shape[0], *layer.shape))


@handles('conv2d')
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
  rule = t.plain('padding', 0)
  if rule in ('same', 'valid'):
    spans = [dilation * (k - 1) * (rule == 'same') for k in (kh, kw)]
    pads = [(n // 2, n - n // 2) for n in spans]
  else:
    pads = [(n, n) for n in t.integers('padding', (0, 0))]
  sizes = padding.window_sizes(t, (h, w), (kh, kw), strides, pads, dilation)
  return output(
    t.add(
      'conv',
      [x],
      (out, *sizes),
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


def _vector(t: Translator, name: str, size: int, default: float) -> np.ndarray:
  value = t.constant(name)
  if value is None:
    return np.full(size, default, np.float32)
  if value.shape != (size,):
    t.refuse(f'its {name} is {list(value.shape)}, expected [{size}]')
  return value


@handles('linear')
def _linear(t: Translator) -> Feature:
  x, weight = t.feature('input'), t.constant('weight')
  c, h, w = x.layer.shape
  if len(x.shape) != 2 or x.shape[1] != c * h * w:
    t.refuse(
      f'it takes a tensor of shape {list(x.shape)}, and only dense layers on '
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


@handles('batch_norm')
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
  return output(layer, t.feature('input'))
