"""Makes a dense layer, the classifier, the last one of a network."""

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.importing.layer import UNPADDED, Layer

# What may follow a classifier.
_AFTER_LOGITS = ('act', 'affine', 'global_avg_pool', 'avg_pool', 'max_pool')
# With a layer after the classifier, a square matrix of ones becomes the last.
_MOST_CLASSES = 8192


def ending(layers: list[Layer], source: str) -> list[Layer]:
  """Makes the last layer a dense one."""
  *layers, output = layers
  (last,) = output.inputs
  if last.op == 'conv_bn' and 'act' not in last.options:
    last = _without_batch_norm(last)
  if last.op == 'affine' and last.is_vector and layers[-1] is last:
    # The mean of two heads, say.
    _refuse_no_classifier(last.inputs[0], source)
    last.op, last.options = 'dense', {'features': last.shape[0]}
    last.arrays = {
      'kernel': np.diag(last.arrays['factor']),
      'bias': last.arrays['shift'],
    }
    return layers
  if (
    last.op == 'global_avg_pool'
    and _is_pointwise(last.inputs[0])
    and layers[-1] is last
    and layers[-2] is last.inputs[0]
  ):
    # The mean of a 1x1 convolution is the convolution of the mean.
    pool, conv = last, last.inputs[0]
    pool.inputs, pool.shape = conv.inputs, (conv.inputs[0].shape[0], 1, 1)
    conv.inputs, conv.shape = [pool], (conv.shape[0], 1, 1)
    layers[-2:] = [pool, conv]
    last = conv
  if _is_dense(last) and layers[-1] is last:
    kernel = last.arrays['kernel']
    rows = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])
    last.op, last.options = 'dense', {'features': last.shape[0]}
    last.arrays = {'kernel': rows, 'bias': last.arrays['bias']}
  else:
    _refuse_no_classifier(last, source)
    # The classifier is followed by other layers: a dense one of ones.
    layers.append(
      Layer(
        'dense',
        [last],
        last.shape,
        {'features': last.shape[0]},
        {'kernel': np.eye(last.shape[0]), 'bias': np.zeros(last.shape[0])},
        'logits',
      )
    )
  return layers


def _refuse_no_classifier(last: Layer, source: str) -> None:
  """Refuses a network that ends in features.

  A 1x1 convolution, also of each pixel, can be a classifier. With BatchNorm and
  an activation after it, it is a layer of the network's body.
  """
  layer, acts = last, 0
  while layer.op in _AFTER_LOGITS:
    acts += layer.op == 'act'
    (layer,) = layer.inputs
  acts += 'act' in layer.options
  if not (
    (layer.op == 'conv' and layer.options.get('groups', 1) == 1)
    or (
      layer.op == 'conv_bn' and not acts and layer.options.get('groups', 1) == 1
    )
    or (layer.op == 'add' and layer.is_vector)
    or (layer.op == 'concat' and all(map(_is_dense, layer.inputs)))
  ):
    raise InputError(
      f'{source}: the network ends in {last.where}, after no dense layer and '
      'no 1x1 convolution: its result is features, not logits; export it with '
      'its classifier'
    )
  if last.shape[0] > _MOST_CLASSES:
    raise InputError(
      f'{source}: {last.where} follows the classifier of {last.shape[0]:,} '
      f'classes; for more than {_MOST_CLASSES:,}, return the logits themselves'
    )


def _is_pointwise(layer: Layer) -> bool:
  return (
    layer.op == 'conv'
    and 'act' not in layer.options
    and layer.options['kernel'] == (1, 1)
    and layer.options['groups'] == layer.options['strides'] == 1
    and layer.options['padding'] == UNPADDED
  )


def _is_dense(layer: Layer) -> bool:
  return (
    layer.op == 'conv'
    and 'act' not in layer.options
    and layer.options.get('groups', 1) == 1
    and layer.options['padding'] == UNPADDED
    and layer.options['kernel'] == layer.inputs[0].shape[1:]
  )


def _without_batch_norm(layer: Layer) -> Layer:
  """Folds the BatchNorm of the classifier itself."""
  a = {k: v.astype(np.float64) for k, v in layer.arrays.items()}
  gain = a['scale'] / np.sqrt(a['var'] + layer.options.pop('epsilon'))
  layer.op = 'conv'
  layer.arrays = {
    'kernel': a['kernel'] * gain,
    'bias': a['bias'] - a['mean'] * gain,
  }
  return layer
