"""Folds a student into an integer network; runs once, in NumPy."""

from typing import Any, NamedTuple

import numpy as np

from clusterq_jax.deploy.integer import (
  Grid,
  IntegerNetwork,
  Layer,
  Weights,
  window_share,
)
from clusterq_jax.layers import float_layers
from clusterq_jax.models.graph import Graph, Node
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import quantizers
from clusterq_jax.quant.plan import Plan

# float32 adds integers exactly, in any order, if all sums are below this.
_EXACT = 2**24
# Biases have 32 bits. The bias of a channel with a BatchNorm gain near zero
# would exceed them.
_BIAS_LIMIT = 2**30
# CPUs without VNNI add pairs of products in saturating 16-bit integers.
_PAIR_LIMIT = 2**15 - 1


def fold(
  graph: Graph, plan: Plan, student: Any, preprocessing: Preprocessing
) -> IntegerNetwork:
  """Folds a student into its integer network.

  Args:
    graph: graph of the architecture.
    plan: quantizers of the student, with 'integer' placement.
    student: variables {'params', 'batch_stats', 'quant'}.
    preprocessing: preprocessing of the student.
  """
  layers: dict[str, Layer] = {}
  for node in graph.nodes:
    sources = tuple(
      grid
      for name in node.inputs
      if name in layers and (grid := layers[name].grid) is not None
    )
    layers[node.name] = _layer(node, sources, plan, student, preprocessing)
  return IntegerNetwork(graph, layers, preprocessing)


def _layer(
  node: Node,
  sources: tuple[Grid, ...],
  plan: Plan,
  student: Any,
  preprocessing: Preprocessing,
) -> Layer:
  if node.moves:
    return Layer(node, sources, sources[0])
  if node.op == 'dense':
    weights = _weights(node, sources[0], plan, student)
    return Layer(node, sources, None, weights, sources[0].step * weights.step)
  grid = _grid(node, plan, student)
  if node.op == 'input':
    return Layer(node, sources, grid, table=_input_table(grid, preprocessing))
  if node.op == 'add':
    table = _add_table(sources[0], sources[1], grid)
    return Layer(node, sources, grid, table=table)
  if node.op == 'conv_bn':
    weights = _weights(node, sources[0], plan, student)
    multiplier = sources[0].step * weights.step / grid.step
    return Layer(node, sources, grid, weights, multiplier)
  if node.op == 'avg_pool':
    multiplier = np.asarray(sources[0].step * window_share(node) / grid.step)
    return Layer(node, sources, grid, multiplier=multiplier)
  # The multiplier of a global pool depends on the size of the image.
  return Layer(node, sources, grid)


def round_biases(network: IntegerNetwork, student: Any) -> dict[str, Any]:
  """Returns the student's params with the integer network's rounded biases.

  With these biases and kernels on their grid (`quantizers.settle`), the
  fake-quantized and the integer network differ only by float rounding. The
  integer network does not change.

  Args:
    network: result of `fold`.
    student: the folded variables {'params', 'batch_stats', 'quant'}.
  """
  params = dict(student['params'])
  for name, layer in network.layers.items():
    if layer.weights is not None:
      unit = np.float64(layer.sources[0].step) * layer.weights.step
      exact = fold_batch_norm(student, layer.node).bias
      # With BatchNorm, params['bias'] is only one term of the folded bias, so
      # it takes the rounding error of the sum.
      bias = np.asarray(params[name]['bias'], np.float64)
      bias = bias + (layer.weights.bias * unit - exact)
      params[name] = {**params[name], 'bias': bias.astype(np.float32)}
  return params


def _grid(node: Node, plan: Plan, student: Any) -> Grid:
  own = student['quant'].get(node.name, {})
  found = quantizers.output_grid(plan, node.name, own)
  assert found is not None, f'{node.name} has no quantizer'
  output = plan.output(node.name)
  assert output is not None
  step, low, high = np.float32(found.step), int(found.low), int(found.high)
  if node.act == 'relu6':
    high = min(high, int(np.rint(np.float32(float_layers.RELU6) / step)))
  zero = 128 if output.signed else 0
  return Grid(step, zero, zero + low, zero + high)


def _input_table(grid: Grid, preprocessing: Preprocessing) -> np.ndarray:
  """Returns the code of each pixel value 0 to 255, uint8 [C, 256]."""
  gain, offset = normalization(preprocessing)
  x = np.arange(256, dtype=np.float32) * gain[:, None] + offset[:, None]
  codes = np.rint(x / grid.step) + grid.zero
  return np.clip(codes, grid.low, grid.high).astype(np.uint8)


def normalization(
  preprocessing: Preprocessing,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (gain, offset), float32 [C]: input = pixel * gain + offset."""
  mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
  gain = preprocessing.pixel_range / 255 / std
  return gain.astype(np.float32), (-mean / std).astype(np.float32)


def _add_table(a: Grid, b: Grid, out: Grid) -> np.ndarray:
  """Returns the output code for each pair of operand codes, uint8 [256, 256].

  ONNX Runtime computes two fused multiply-adds, the second operand first. The
  products and sums are exact in float64. One rounding to float32 after each sum
  gives the result of a fused multiply-add.
  """
  ratio_a, ratio_b = a.step / out.step, b.step / out.step
  zeros = ratio_a * np.float32(a.zero) + ratio_b * np.float32(b.zero)
  codes = np.arange(256, dtype=np.float64)
  y = np.float32(codes * ratio_b + np.float32(out.zero - zeros))
  x = np.float32(codes[:, None] * ratio_a + np.float64(y))
  return np.clip(np.rint(x), out.low, out.high).astype(np.uint8)


class Affine(NamedTuple):
  """Affine map of a layer with weights: kernel * x * gain + bias.

  Attributes:
    kernel: float32 [..., O].
    gain: float64 [O]; ones without BatchNorm.
    bias: float64 [O].
  """

  kernel: np.ndarray
  gain: np.ndarray
  bias: np.ndarray


def fold_batch_norm(variables: Any, node: Node) -> Affine:
  """Folds the BatchNorm of a layer, if it has one, into an affine map.

  Args:
    variables: {'params', 'batch_stats'}.
    node: layer with weights.
  """
  params = variables['params'][node.name]
  kernel = np.asarray(params['kernel'])
  bias = np.asarray(params['bias'], np.float64)
  if 'scale' not in params:
    return Affine(kernel, np.ones(len(bias)), bias)
  stats = variables['batch_stats'][node.name]
  mean, var, scale = (
    np.asarray(array, np.float64)
    for array in (stats['mean'], stats['var'], params['scale'])
  )
  gain = scale / np.sqrt(var + node.epsilon)
  return Affine(kernel, gain, bias - mean * gain)


def _weights(node: Node, source: Grid, plan: Plan, student: Any) -> Weights:
  kernel, gain, bias = fold_batch_norm(student, node)
  own = student['quant'].get(node.name, {})
  grid = quantizers.weight_grid(plan, node.name, kernel, own)
  step, high = np.asarray(grid.step), int(grid.high)
  codes = np.clip(np.rint(kernel / step), grid.low, high)
  # Biases are multiples of (weight step) * (input step), a coarse unit at few
  # bits. Larger weight codes with a smaller step make the unit finer.
  factor = min(127 // high, _PAIR_LIMIT // (2 * source.high * high))
  factor = max(factor, 1)
  worth = step * np.abs(gain)
  # A channel with a gain near zero takes a coarser step, so its bias fits.
  least = np.abs(bias) * factor / (source.step * _BIAS_LIMIT)
  floor = np.maximum(least, 1e-12)
  codes = np.where(worth < floor, np.rint(codes * worth / floor), codes)
  final = (np.maximum(worth, floor) / factor).astype(np.float32)
  codes = (codes * factor * np.where(gain < 0, -1, 1)).astype(np.int8)
  bias = np.rint(bias / (np.float64(source.step) * final)).astype(np.int32)
  largest = max(source.high - source.zero, source.zero - source.low)
  sums = np.abs(np.int64(codes)).sum(tuple(range(codes.ndim - 1)))
  return Weights(codes, bias, final, factor, largest * sums.max() >= _EXACT)
