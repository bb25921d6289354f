"""Runs the integer network in JAX, bit for bit like an integer runtime.

`fold.fold` makes the network from a student, with NumPy.
`IntegerNetwork.logits` runs it under `jit`. Both follow the graph of the
architecture.

The arithmetic equals ONNX Runtime's quantized operators on x86:

- A convolution or classifier accumulates (code - zero) * weight code and the
  bias in 32-bit integers. It rescales the sum once, by one float32 multiplier
  per channel, and rounds half to even. Average pools do the same.
- An add is one fused multiply-add per operand, here a table over pairs of
  codes.
- BatchNorm is folded into the steps of the weights and into the bias. Only the
  sign of its gain changes the weight codes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clusterq_jax.layers import float_layers
from clusterq_jax.models.graph import Graph, Node
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.ops import convolution


class Grid(NamedTuple):
  """Grid of a tensor's unsigned 8-bit codes: real = step * (code - zero).

  Attributes:
    step: distance between neighbouring real values.
    zero: code of the real value 0; 128 for signed tensors, else 0.
    low: smallest code.
    high: largest code.
  """

  step: np.float32
  zero: int
  low: int
  high: int


class Weights(NamedTuple):
  """Integer weights with BatchNorm folded in.

  The real weight is step * codes. With an input of step s, the real bias is
  s * step * bias.

  Attributes:
    codes: int8 [..., O].
    bias: int32 [O].
    step: float32 [O].
    factor: ratio of `codes` to the codes at the student's bit width.
    wide: whether sums can exceed the integers that float32 represents exactly.
  """

  codes: np.ndarray
  bias: np.ndarray
  step: np.ndarray
  factor: int
  wide: bool


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of an integer network.

  Inputs and adds look up their output codes in `table`. Other layers compute
  clip(round(sums * multiplier) + grid.zero, grid.low, grid.high). The logits
  are the classifier's sums * multiplier.

  Attributes:
    node: node of the graph.
    sources: grids of the inputs.
    grid: grid of the output; None for logits.
    weights: weights of a convolution or classifier, else None.
    multiplier: float32; [O] with weights, [] for an average pool, else 1.
    table: output codes, uint8. The input layer has [C, 256], by channel and
      pixel value. An add has [256, 256], by the codes of both operands.
  """

  node: Node
  sources: tuple[Grid, ...]
  grid: Grid | None
  weights: Weights | None = None
  multiplier: np.ndarray | np.float32 = np.float32(1)
  table: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class IntegerNetwork:
  """Integer network, ready to run.

  Attributes:
    graph: graph of the architecture.
    layers: layers by name, in forward order.
    preprocessing: preprocessing of the input.
  """

  graph: Graph
  layers: dict[str, Layer]
  preprocessing: Preprocessing

  def logits(self, images: jax.Array) -> jax.Array:
    """Runs the network; call it under `jit`.

    Args:
      images: uint8 [B, H, W, C], RGB.

    Returns:
      float32 logits [B, K].
    """
    if self.preprocessing.channel_order == 'bgr':
      images = images[..., ::-1]
    values: dict[str, jax.Array] = {}
    for name, layer in self.layers.items():
      inputs = [values[source] for source in layer.node.inputs if values]
      values[name] = _OPS[layer.node.op](layer, *inputs or [images])
    return values[self.graph.nodes[-1].name]


def window_share(node: Node) -> np.ndarray:
  """Returns the weight of each value in an average pool's window."""
  return np.asarray(1 / math.prod(node.kernel), np.float32)


def weighted_sums(
  layer: Layer,
  x: jax.Array,
  product: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Returns the exact sums of a layer: products of codes, plus the bias.

  The products run in float32, which is fast on all platforms and exact for
  small integers. If the sums could become too large, two products run, on the
  high and the low four bits of the input codes.

  Args:
    layer: layer with weights.
    x: input codes, uint8 [B, ..., I].
    product: multiplies centred input codes by weight codes, both float32.

  Returns:
    int32 [B, ..., O].
  """
  weights = layer.weights
  assert weights is not None
  centred = x.astype(jnp.int32) - layer.sources[0].zero
  kernel = jnp.asarray(weights.codes).astype(jnp.float32)

  def whole(x):
    return product(x.astype(jnp.float32), kernel).astype(jnp.int32)

  if weights.wide:
    sums = 16 * whole(centred >> 4) + whole(centred & 15)
  else:
    sums = whole(centred)
  return sums + jnp.asarray(weights.bias)


def _to_grid(grid: Grid | None, scaled: jax.Array) -> jax.Array:
  assert grid is not None
  codes = jnp.round(scaled) + grid.zero
  return jnp.clip(codes, grid.low, grid.high).astype(jnp.uint8)


def _input(layer: Layer, images: jax.Array) -> jax.Array:
  rows = jnp.asarray(layer.table)
  return jnp.stack([row[images[..., c]] for c, row in enumerate(rows)], -1)


def _conv_bn(layer: Layer, x: jax.Array) -> jax.Array:
  node = layer.node
  convolve = functools.partial(
    convolution.convolve,
    strides=node.strides,
    pads=convolution.explicit(
      x.shape[1:3], node.kernel, node.strides, node.padding, node.dilation
    ),
    groups=node.groups,
    precision=lax.Precision.HIGHEST,
    dilation=node.dilation,
  )
  sums = weighted_sums(layer, x, convolve)
  return _to_grid(layer.grid, sums.astype(jnp.float32) * layer.multiplier)


def _dense(layer: Layer, x: jax.Array) -> jax.Array:
  multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  sums = weighted_sums(layer, float_layers.flatten(x), multiply)
  return sums.astype(jnp.float32) * layer.multiplier


def _add(layer: Layer, x: jax.Array, y: jax.Array) -> jax.Array:
  pairs = x.astype(jnp.int32) * 256 + y
  return jnp.asarray(layer.table).reshape(-1)[pairs]


def _pad_shortcut(layer: Layer, x: jax.Array) -> jax.Array:
  node, zero = layer.node, layer.sources[0].zero
  assert node.features is not None
  return float_layers.pad_channels(x, node.features, node.strides, zero)


def _max_pool(layer: Layer, x: jax.Array) -> jax.Array:
  node = layer.node
  # The initial value pads the window: code 0 is the smallest.
  return lax.reduce_window(
    x,
    np.uint8(0),
    lax.max,
    (1, *node.kernel, 1),
    (1, node.strides, node.strides, 1),
    (
      (0, 0),
      *convolution.explicit(
        x.shape[1:3], node.kernel, node.strides, node.padding
      ),
      (0, 0),
    ),
  )


def _avg_pool(layer: Layer, x: jax.Array) -> jax.Array:
  node = layer.node
  sums = lax.reduce_window(
    x.astype(jnp.int32) - layer.sources[0].zero,
    np.int32(0),
    lax.add,
    (1, *node.kernel, 1),
    (1, node.strides, node.strides, 1),
    'VALID',
  )
  return _to_grid(layer.grid, sums.astype(jnp.float32) * layer.multiplier)


def _global_avg_pool(layer: Layer, x: jax.Array) -> jax.Array:
  (source,), grid = layer.sources, layer.grid
  assert grid is not None
  pixels = np.float32(x.shape[1] * x.shape[2])
  centred = x.astype(jnp.int32) - source.zero
  sums = jnp.sum(centred, (1, 2), keepdims=True)
  # ONNX Runtime rounds in this order.
  multiplier = source.step / (grid.step * pixels)
  return _to_grid(grid, sums.astype(jnp.float32) * multiplier)


_OPS: dict[str, Callable[..., jax.Array]] = {
  'input': _input,
  'conv_bn': _conv_bn,
  'dense': _dense,
  'add': _add,
  'pad_shortcut': _pad_shortcut,
  'max_pool': _max_pool,
  'avg_pool': _avg_pool,
  'global_avg_pool': _global_avg_pool,
}
