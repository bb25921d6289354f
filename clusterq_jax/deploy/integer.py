"""Runs the integer network in JAX, bit for bit like an integer runtime.

`fold.fold` makes the network from a student, with NumPy.
`IntegerNetwork.logits` runs it under `jit`. Both follow the graph of the
architecture.

The arithmetic equals ONNX Runtime's quantized operators on x86:

- A convolution or classifier accumulates (code - zero) * weight code and the
  bias in 32-bit integers. It rescales the sum once, by one float32 multiplier
  per channel, and rounds half to even. Average pools do the same.
- An add is one fused multiply-add per operand. Adds and products are tables
  over pairs of codes, activations are tables over codes.
- A padded average pool that does not count zeros adds float32 numbers, row by
  row.
- Moves do not change codes. Inputs of a concat move to the grid of its output.
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

from clusterq_jax.layers import functions
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.node import Node
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

  def values(self) -> np.ndarray:
    """Returns the real value of each code 0 to 255, float32 [256]."""
    return (np.arange(256, dtype=np.float32) - self.zero) * self.step

  def same_codes(self, other: 'Grid') -> bool:
    """Tells whether each code means the same value on another grid."""
    return self.step == other.step and self.zero == other.zero


class Weights(NamedTuple):
  """Integer weights with BatchNorm folded in.

  The real weight is step * codes. With an input of step s, the real bias is
  s * step * bias.

  Attributes:
    codes: int8 [..., O].
    bias: int32 [O].
    step: float32 [O].
    factor: ratio of `codes` to the codes at the student's bit width.
    parts: number of parts of the input codes that are multiplied one by one, so
      that float32 represents all sums exactly.
  """

  codes: np.ndarray
  bias: np.ndarray
  step: np.ndarray
  factor: int
  parts: int


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of an integer network.

  Layers with a `table` look up their output codes. Other layers compute
  clip(round(sums * multiplier) + grid.zero, grid.low, grid.high). The logits
  are the classifier's sums * multiplier.

  Attributes:
    node: node of the graph.
    sources: grids of the inputs.
    grid: grid of the output; None for logits.
    weights: weights of a convolution or classifier, else None.
    multiplier: float32; [O] with weights, [] for an average pool, else 1.
    table: output codes, uint8. The input layer has [C, 256], by channel and
      pixel value. Sums and products have [256, 256], by the codes of both
      operands. An activation has [256], or [C, 256] for prelu. A concat has
      [inputs, 256], or None if all codes stay.
    slopes: slopes of a prelu below zero, float32 [C].
  """

  node: Node
  sources: tuple[Grid, ...]
  grid: Grid | None
  weights: Weights | None = None
  multiplier: np.ndarray | np.float32 = np.float32(1)
  table: np.ndarray | None = None
  slopes: np.ndarray | None = None


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
    return self.outputs(images)[self.graph.nodes[-1].name]

  def outputs(self, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the codes of each layer by name, and the logits; see `logits`."""
    if self.preprocessing.channel_order == 'bgr':
      images = images[..., ::-1]
    values: dict[str, jax.Array] = {}
    for name, layer in self.layers.items():
      inputs = [values[source] for source in layer.node.inputs]
      values[name] = _OPS[layer.node.op](layer, *inputs or [images])
    return values


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
  small integers. If the sums could become too large, one product runs for each
  part of the input codes, such as their high and their low four bits.

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

  bits = 8 // weights.parts
  sums = jnp.zeros((), jnp.int32)
  for i in reversed(range(weights.parts)):
    part = centred >> (i * bits)  # the first part has the sign
    if i < weights.parts - 1:
      part &= 2**bits - 1
    products = product(part.astype(jnp.float32), kernel)
    sums = (sums << bits) + products.astype(jnp.int32)
  return sums + jnp.asarray(weights.bias)


def _to_grid(grid: Grid | None, scaled: jax.Array) -> jax.Array:
  assert grid is not None
  codes = jnp.round(scaled) + grid.zero
  return jnp.clip(codes, grid.low, grid.high).astype(jnp.uint8)


def _input(layer: Layer, images: jax.Array) -> jax.Array:
  rows = jnp.asarray(layer.table)
  return jnp.stack([row[images[..., c]] for c, row in enumerate(rows)], -1)


def _conv(layer: Layer, x: jax.Array) -> jax.Array:
  node = layer.node
  convolve = functools.partial(
    convolution.exact,
    strides=node.strides,
    pads=convolution.explicit(
      x.shape[1:3], node.kernel, node.strides, node.padding, node.dilation
    ),
    groups=node.groups,
    dilation=node.dilation,
  )
  sums = weighted_sums(layer, x, convolve)
  return _to_grid(layer.grid, sums.astype(jnp.float32) * layer.multiplier)


def _dense(layer: Layer, x: jax.Array) -> jax.Array:
  multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  sums = weighted_sums(layer, functions.flatten(x), multiply)
  return sums.astype(jnp.float32) * layer.multiplier


def _pairs(layer: Layer, x: jax.Array, y: jax.Array) -> jax.Array:
  pairs = x.astype(jnp.int32) * 256 + y
  return jnp.asarray(layer.table).reshape(-1)[pairs]


def _act(layer: Layer, x: jax.Array) -> jax.Array:
  table = jnp.asarray(layer.table)
  if table.ndim == 1:
    return table[x]
  rows = 256 * jnp.arange(len(table))
  return table.reshape(-1)[rows + x]


def _concat(layer: Layer, *inputs: jax.Array) -> jax.Array:
  if layer.table is not None:
    inputs = tuple(
      x if np.array_equal(row, np.arange(256)) else jnp.asarray(row)[x]
      for row, x in zip(layer.table, inputs, strict=True)
    )
  return jnp.concatenate(inputs, -1)


def _slice(layer: Layer, x: jax.Array) -> jax.Array:
  return x[..., layer.node.start : layer.node.stop]


def _shuffle(layer: Layer, x: jax.Array) -> jax.Array:
  return functions.shuffle(x, layer.node.groups)


def _pad(layer: Layer, x: jax.Array) -> jax.Array:
  return functions.pad(x, layer.node.padding, layer.sources[0].zero)


def _resize(layer: Layer, x: jax.Array) -> jax.Array:
  return functions.resize(x, layer.node.factor)


def _pad_shortcut(layer: Layer, x: jax.Array) -> jax.Array:
  node, zero = layer.node, layer.sources[0].zero
  assert node.features is not None
  return functions.pad_channels(x, node.features, node.strides, zero)


def _windows(
  layer: Layer, x: jax.Array, start: np.generic, combine: Callable
) -> jax.Array:
  """Combines the values of each window; `start` also pads."""
  node = layer.node
  pads = convolution.explicit(
    x.shape[1:3], node.kernel, node.strides, node.padding
  )
  return lax.reduce_window(
    x,
    start,
    combine,
    (1, *node.kernel, 1),
    (1, node.strides, node.strides, 1),
    ((0, 0), *pads, (0, 0)),
  )


def _max_pool(layer: Layer, x: jax.Array) -> jax.Array:
  return _windows(layer, x, np.uint8(0), lax.max)  # code 0 is the smallest


def counts_all(node: Node) -> bool:
  """Tells whether each window of an average pool counts all its pixels."""
  padded = node.padding not in (0, ((0, 0), (0, 0)))
  return node.count_padding or not padded


def _avg_pool(layer: Layer, x: jax.Array) -> jax.Array:
  (source,), grid = layer.sources, layer.grid
  if counts_all(layer.node):
    centred = x.astype(jnp.int32) - source.zero
    sums = _windows(layer, centred, np.int32(0), lax.add)
    return _to_grid(grid, sums.astype(jnp.float32) * layer.multiplier)
  assert grid is not None
  # A table, because a product might become a fused multiply-add. Barriers keep
  # XLA from joining divisions or multiplying by reciprocals.
  real = jnp.asarray(source.values())[x]
  sums = _windows(layer, real, np.float32(0), lax.add)
  ones = jnp.ones((1, *x.shape[1:3], 1), jnp.float32)
  counts = _windows(layer, ones, np.float32(0), lax.add)
  means = lax.optimization_barrier(sums / lax.optimization_barrier(counts))
  step = lax.optimization_barrier(jnp.asarray(grid.step))
  # ONNX Runtime adds the zero point before it rounds.
  codes = jnp.round(means / step + grid.zero)
  return jnp.clip(codes, grid.low, grid.high).astype(jnp.uint8)


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
  'conv_bn': _conv,
  'conv': _conv,
  'dense': _dense,
  'act': _act,
  'add': _pairs,
  'mul': _pairs,
  'concat': _concat,
  'slice': _slice,
  'shuffle': _shuffle,
  'pad': _pad,
  'pad_shortcut': _pad_shortcut,
  'resize': _resize,
  'max_pool': _max_pool,
  'avg_pool': _avg_pool,
  'global_avg_pool': _global_avg_pool,
}
