"""Rewrites layers until each is one that a graph has.

The order matters: an activation in several calls is found before its constants
are folded into a convolution, a BatchNorm reaches its convolution before an
activation does.
"""

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.importing import classifier
from clusterq_jax.importing.layer import UNPADDED, Counts, Layer, rewrite

_CONVS = ('conv', 'conv_bn')


def run(layers: list[Layer], source: str) -> list[Layer]:
  """Rewrites layers.

  Args:
    layers: what `Translator.run` returned.
    source: what they were read from, for messages.

  Returns:
    Layers whose ops are those of a graph, the last a dense layer; the input
    may be followed by an 'affine' that the caller folds into mean and std.

  Raises:
    InputError: a layer has no place in a graph.
  """
  for rule in (
    _join_affine,
    _compose_hard_sigmoid,
    _compose_hard_swish,
    _join_affine,
    _join_slices,
    _join_affine,
    _fold_batch_norm,
    _fold_affine,
    _join_subsamples,
    _fold_pad,
    _fold_act,
  ):
    layers = rewrite(layers, rule)
  layers = [
    _final(layer, source) for layer in classifier.ending(layers, source)
  ]
  for layer in layers:
    _simplify_padding(layer)
  return layers


def _is_affine(layer: Layer, factor: float, shift: float) -> bool:
  return layer.op == 'affine' and bool(
    np.allclose(layer.arrays['factor'], factor, 1e-6)
    and np.allclose(layer.arrays['shift'], shift, 1e-6)
  )


def _is_act(layer: Layer, *acts: str) -> bool:
  return layer.op == 'act' and layer.options['act'] in acts


def _become_act(layer: Layer, act: str, source: Layer) -> Layer:
  layer.op, layer.inputs = 'act', [source]
  layer.options, layer.arrays = {'act': act}, {}
  return layer


def _shifted_relu6(layer: Layer) -> Layer | None:
  """Returns x if the layer is relu6(x + 3)."""
  if _is_act(layer, 'relu6') and _is_affine(layer.inputs[0], 1, 3):
    return layer.inputs[0].inputs[0]
  return None


def _compose_hard_sigmoid(layer: Layer, counts: Counts) -> Layer:
  """relu6(x + 3) / 6."""
  del counts
  if _is_affine(layer, 1 / 6, 0):
    x = _shifted_relu6(layer.inputs[0])
    if x is not None:
      return _become_act(layer, 'hard_sigmoid', x)
  return layer


def _compose_hard_swish(layer: Layer, counts: Counts) -> Layer:
  """x * hard_sigmoid(x), or x * relu6(x + 3) / 6."""
  del counts
  if layer.op == 'mul':
    for x, gate in (layer.inputs, layer.inputs[::-1]):
      if _is_act(gate, 'hard_sigmoid') and gate.inputs[0] is x:
        return _become_act(layer, 'hard_swish', x)
  if _is_affine(layer, 1 / 6, 0) and layer.inputs[0].op == 'mul':
    product = layer.inputs[0]
    for x, gate in (product.inputs, product.inputs[::-1]):
      if _shifted_relu6(gate) is x:
        return _become_act(layer, 'hard_swish', x)
  return layer


def _join_slices(layer: Layer, counts: Counts) -> Layer:
  """The concat of all channels in order, each with its own affine."""
  del counts
  if layer.op != 'concat':
    return layer
  slices, factors, shifts = [], [], []
  for source in layer.inputs:
    factor, shift = np.ones(source.shape[0]), np.zeros(source.shape[0])
    if source.op == 'affine':
      factor, shift = source.arrays['factor'], source.arrays['shift']
      source = source.inputs[0]
    slices.append(source)
    factors.append(factor)
    shifts.append(shift)
  if any(s.op != 'slice' for s in slices):
    return layer
  (x, *others) = {id(s.inputs[0]): s.inputs[0] for s in slices}.values()
  starts = [s.options['start'] for s in slices] + [x.shape[0]]
  stops = [0] + [s.options['stop'] for s in slices]
  if others or starts != stops:
    return layer
  layer.op, layer.inputs, layer.options = 'affine', [x], {}
  layer.arrays = {
    'factor': np.concatenate(factors),
    'shift': np.concatenate(shifts),
  }
  return layer


def _join_affine(layer: Layer, counts: Counts) -> Layer:
  """An affine after an affine; one that changes nothing."""
  if layer.op != 'affine':
    return layer
  (x,) = layer.inputs
  if _is_affine(layer, 1, 0):
    return x
  if x.op == 'affine' and counts[x] == 1:
    x.arrays = _after(x.arrays, 'factor', 'shift', layer)
    return x
  return layer


def _after(
  arrays: dict[str, np.ndarray], factor: str, shift: str, affine: Layer
) -> dict[str, np.ndarray]:
  """Returns arrays of a scale and a shift, with an affine after them."""
  a, b = affine.arrays['factor'], affine.arrays['shift']
  return {
    **arrays,
    factor: arrays[factor] * a,
    shift: arrays[shift] * a + b,
  }


def _fold_batch_norm(layer: Layer, counts: Counts) -> Layer:
  """BatchNorm into the convolution before it, else a convolution of ones."""
  if layer.op != 'batch_norm':
    return layer
  (x,) = layer.inputs
  if (
    x.op == 'affine'
    and x.inputs[0].op == 'conv'
    and (counts[x] == counts[x.inputs[0]] == 1)
  ):
    x = layer.inputs[0] = _scaled_conv(x.inputs[0], x)
    counts[x] = 1
  arrays = layer.arrays
  if x.op == 'conv' and counts[x] == 1:
    x.op = 'conv_bn'
    x.options['epsilon'] = layer.options['epsilon']
    # A bias before BatchNorm only moves the mean.
    mean = arrays['mean'].astype(np.float64) - x.arrays['bias']
    x.arrays = {**arrays, 'kernel': x.arrays['kernel'], 'mean': mean}
    return x
  channels = layer.shape[0]
  layer.op = 'conv_bn'
  layer.arrays = {'kernel': np.ones((1, 1, 1, channels)), **arrays}
  layer.options |= _depthwise(channels)
  return layer


def _depthwise(channels: int) -> dict:
  return {
    'features': channels,
    'kernel': (1, 1),
    'groups': channels,
    'padding': UNPADDED,
  }


def _scaled_conv(conv: Layer, affine: Layer) -> Layer:
  factor, shift = affine.arrays['factor'], affine.arrays['shift']
  conv.arrays = {
    'kernel': conv.arrays['kernel'] * factor,
    'bias': conv.arrays['bias'] * factor + shift,
  }
  return conv


def _fold_affine(layer: Layer, counts: Counts) -> Layer:
  """An affine into the convolution or BatchNorm before it."""
  if layer.op != 'affine':
    return layer
  (x,) = layer.inputs
  if x.op == 'input' and counts[x] == 1:
    return layer
  if x.op in _CONVS and counts[x] == 1:
    if x.op == 'conv':
      return _scaled_conv(x, layer)
    x.arrays = _after(x.arrays, 'scale', 'bias', layer)
    return x
  return layer


def _join_subsamples(layer: Layer, counts: Counts) -> Layer:
  """Rows and columns at once; with more channels, a shortcut of ResNet."""
  (x, *others) = layer.inputs or [layer]
  if others or x.op != 'subsample' or counts[x] != 1:
    return layer
  high, wide = x.options['steps']
  if layer.op == 'subsample':
    steps = layer.options['steps']
    x.options['steps'] = (high * steps[0], wide * steps[1])
    x.shape = layer.shape
    return x
  if layer.op == 'pad_channels' and high == wide and _is_even(layer):
    x.op, x.shape = 'pad_shortcut', layer.shape
    x.options = {'features': layer.shape[0], 'strides': high}
    return x
  return layer


def _is_even(layer: Layer) -> bool:
  """Tells whether channels are padded as `pad_shortcut` does."""
  return layer.options['before'] == (
    (layer.options['before'] + layer.options['after']) // 2
  )


def _fold_pad(layer: Layer, counts: Counts) -> Layer:
  """Padding into the convolutions and pools that read it."""
  del counts
  if not layer.inputs or layer.inputs[0].op != 'pad':
    return layer
  pad = layer.inputs[0]
  value, more = pad.options['value'], pad.options['padding']
  own = layer.options.get('padding', UNPADDED)
  whole = tuple(
    (a + c, b + d) for (a, b), (c, d) in zip(own, more, strict=True)
  )
  if layer.op in _CONVS:
    fits = value == 0
  elif layer.op in ('max_pool', 'avg_pool'):
    # A padding below all values is what a max pool itself takes.
    fits = value <= -1e4
    if layer.op == 'avg_pool':
      counts_zeros = layer.options.get('count_padding', False)
      fits = value == 0 and (counts_zeros or own == UNPADDED)
    # A window must have a pixel of the image.
    sides = zip(whole, layer.options['kernel'], strict=True)
    fits = fits and all(max(pads) < side for pads, side in sides)
  else:
    fits = False
  if fits:
    layer.inputs = [pad.inputs[0]]
    layer.options['padding'] = whole
    if layer.op == 'avg_pool':
      layer.options['count_padding'] = True
  return layer


def _fold_act(layer: Layer, counts: Counts) -> Layer:
  """A clipping activation into the layer before it."""
  if not _is_act(layer, 'relu', 'relu6'):
    return layer
  (x,) = layer.inputs
  if x.op in (*_CONVS, 'add') and 'act' not in x.options and counts[x] == 1:
    x.options['act'] = layer.options['act']
    return x
  return layer


def make_conv(layer: Layer) -> None:
  """Makes an affine a depthwise 1x1 convolution."""
  channels = layer.shape[0]
  layer.op = 'conv'
  layer.arrays = {
    'kernel': layer.arrays['factor'].reshape(1, 1, 1, channels),
    'bias': layer.arrays['shift'],
  }
  layer.options = _depthwise(channels)


def _final(layer: Layer, source: str) -> Layer:
  """Replaces an op that no graph has by the convolution or pool that it is."""
  channels = layer.shape[0]
  if layer.op == 'affine' and layer.inputs[0].op != 'input':
    make_conv(layer)
  elif layer.op == 'subsample':
    high, wide = layer.options['steps']
    if high != wide:
      raise InputError(
        f'{source}: {layer.where}: it takes every {high}-th row and every '
        f'{wide}-th column, and only equal steps can be imported; replace the '
        'module, or take a network without it'
      )
    layer.op = 'max_pool'
    layer.options = {'kernel': (1, 1), 'strides': high, 'padding': UNPADDED}
  elif layer.op == 'pad_channels':
    if _is_even(layer):
      layer.op = 'pad_shortcut'
      layer.options = {'features': channels, 'strides': 1}
    else:
      kept = layer.inputs[0].shape[0]
      kernel = np.eye(kept, channels, layer.options['before'])
      layer.op = 'conv'
      layer.arrays = {
        'kernel': kernel[None, None],
        'bias': np.zeros(channels),
      }
      layer.options = {
        'features': channels,
        'kernel': (1, 1),
        'padding': UNPADDED,
      }
  elif layer.op == 'crop':
    (top, bottom), (left, right) = layer.options['margins']
    kernel = np.zeros((1 + top + bottom, 1 + left + right, 1, channels))
    kernel[top, left] = 1
    layer.op = 'conv'
    layer.arrays = {'kernel': kernel, 'bias': np.zeros(channels)}
    layer.options = _depthwise(channels) | {'kernel': kernel.shape[:2]}
  elif layer.op == 'pad':
    value = layer.options.pop('value')
    if value != 0:
      raise InputError(
        f'{source}: {layer.where}: it pads with {value:g}, and only zeros, or '
        'values far below all others before a max pool, can be imported; '
        'replace the module, or take a network without it'
      )
  return layer


def _simplify_padding(layer: Layer) -> None:
  """Writes a padding as the networks in `models` do, if it is one of theirs."""
  pads = layer.options.get('padding')
  if pads is None or layer.op == 'pad':
    return
  half = [
    k // 2 * layer.options.get('dilation', 1) for k in layer.options['kernel']
  ]
  if pads == tuple((n, n) for n in half):
    layer.options['padding'] = None
  elif len({n for pair in pads for n in pair}) == 1:
    layer.options['padding'] = pads[0][0]
