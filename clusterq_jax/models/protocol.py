"""The layer protocol: the layers that an architecture may be built from.

A network in `models/` is a Linen module with an attribute `layers: LayerSet`.
It uses only the factories of `LayerSet`, each with an explicit `name`. The set
that it gets decides what the network becomes:

  * `layers/float_layers.py` makes the teacher,
  * `layers/fake_quant.py` makes the student,
  * the recorder of `graph.trace` makes a `Graph` and computes nothing.

The protocol has no layer that no network here needs yet.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from clusterq_jax.ops.convolution import Padding as Padding

Activation = Literal['relu', 'relu6'] | None
Layer = Callable[..., Any]
EPSILON = 1e-5  # added to variances in BatchNorm; torch's default


@dataclasses.dataclass(frozen=True)
class LayerSet:
  """Factories of layers; hashable, so that it can be a module attribute.

  Attributes:
    input: `input(name=)(x)`: the input of the network, x [B, H, W, C].
    conv_bn: `conv_bn(features, kernel, strides, padding, groups, act, epsilon,
      name=)(x)`: convolution without bias, BatchNorm, activation.
    dense: `dense(features, name=)(x)`: x [B, C] to logits [B, features]; x
      [B, H, W, C] is flattened in torch's order: channel, row, column.
    add: `add(act, name=)(x, y)`: elementwise sum, then activation.
    pad_shortcut: `pad_shortcut(features=, strides=, name=)(x)`: every
      `strides`-th pixel, channels zero-padded on both sides to `features`
      (the parameter-free shortcut, option A of He et al. 2015).
    max_pool: `max_pool(kernel=, strides=, padding=, name=)(x)`: the largest
      value of each window; padding is never the largest.
    avg_pool: `avg_pool(kernel=, strides=, name=)(x)`: the mean of each window,
      without padding.
    global_avg_pool: `global_avg_pool(name=)(x)`: [B, H, W, C] to [B, C].
  """

  input: Layer
  conv_bn: Layer
  dense: Layer
  add: Layer
  pad_shortcut: Layer
  max_pool: Layer
  avg_pool: Layer
  global_avg_pool: Layer
