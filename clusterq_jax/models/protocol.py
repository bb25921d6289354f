"""The layer protocol: the layers that a network may be built from.

A network is a `graph.Graph`: a list of nodes, each made by one factory of
`LayerSet`. `network.Network` builds the nodes with the layer set that it gets,
and the set decides what the network becomes:

  * `layers/float_layers.py` makes the teacher,
  * `layers/fake_quant.py` makes the student.

A network can also be written as a Linen module with an attribute `layers:
LayerSet`, as in `models/cifar_resnet.py`. It uses only the factories, each with
an explicit `name`. The recorder of `graph.trace` then reads its graph off.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from clusterq_jax.ops.convolution import Padding as Padding
from clusterq_jax.ops.convolution import Window as Window

# Activations that only clip. A layer applies them to its own output, and the
# ends of an integer grid replace them.
Clipping = Literal['relu', 'relu6'] | None
CLIPPING = ('relu', 'relu6')
# All activations, for the layer `act`.
Activation = Literal[
  'relu',
  'relu6',
  'leaky_relu',
  'hard_sigmoid',
  'sigmoid',
  'hard_swish',
  'gelu',
  'gelu_tanh',
  'elu',
  'tanh',
  'prelu',
]
Layer = Callable[..., Any]
EPSILON = 1e-5  # added to variances in BatchNorm; torch's default
SLOPE = 0.01  # of leaky_relu below zero; torch's default


@dataclasses.dataclass(frozen=True)
class LayerSet:
  """Factories of layers; hashable, so that it can be a module attribute.

  A feature map is [B, H, W, C]; a vector is a feature map of one pixel.

  Attributes:
    input: `input(name=)(x)`: the input of the network, x [B, H, W, C].
    conv_bn: `conv_bn(features, kernel, strides=, padding=, dilation=, groups=,
      act=, epsilon=, name=)(x)`: convolution without bias, BatchNorm,
      activation. A BatchNorm alone is a depthwise 1x1 convolution with ones.
    conv: `conv(features, kernel, strides=, padding=, dilation=, groups=, act=,
      name=)(x)`: convolution with bias, activation. A hidden dense layer is a
      convolution whose kernel covers the map.
    dense: `dense(features, name=)(x)`: the classifier; x [B, H, W, C] or [B, C]
      to logits [B, features]. Flattens in torch's order: channel, row, column.
    act: `act(act, slope=, name=)(x)`: an activation alone. `slope` is that of
      leaky_relu, or elu's limit.
    add: `add(act=, name=)(x, y)`: elementwise sum, then activation. One operand
      may be a vector.
    mul: `mul(name=)(x, y)`: elementwise product. One operand may be a vector.
    concat: `concat(name=)(x, y, ...)`: the channels of all inputs in order.
    slice: `slice(start=, stop=, name=)(x)`: channels from start to before stop.
    shuffle: `shuffle(groups=, name=)(x)`: channels [groups, n] transposed to
      [n, groups].
    pad: `pad(padding=, name=)(x)`: zeros around the map.
    pad_shortcut: `pad_shortcut(features=, strides=, name=)(x)`: every
      `strides`-th pixel, channels zero-padded on both sides to `features`
      (the parameter-free shortcut, option A of He et al. 2015).
    resize: `resize(factor=, name=)(x)`: each pixel repeated, factor x factor.
    max_pool: `max_pool(kernel=, strides=, padding=, name=)(x)`: the largest
      value of each window; padding is never the largest.
    avg_pool: `avg_pool(kernel=, strides=, padding=, count_padding=, name=)(x)`:
      the mean of each window. Padded zeros count only with `count_padding`.
    global_avg_pool: `global_avg_pool(name=)(x)`: the mean over all pixels, as a
      vector [B, 1, 1, C].
  """

  input: Layer
  conv_bn: Layer
  conv: Layer
  dense: Layer
  act: Layer
  add: Layer
  mul: Layer
  concat: Layer
  slice: Layer
  shuffle: Layer
  pad: Layer
  pad_shortcut: Layer
  resize: Layer
  max_pool: Layer
  avg_pool: Layer
  global_avg_pool: Layer
