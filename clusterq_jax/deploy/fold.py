"""Folds a student into an integer network, with NumPy, once."""

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

# float32 adds up integers below this exactly, in any order.
_EXACT = 2**24
# A bias has 32 bits. A dead BatchNorm gain would ask for more.
_BIAS_LIMIT = 2**30
# CPUs without VNNI add two products in 16 bits.
_PAIR_LIMIT = 2**15 - 1


def fold(
  graph: Graph, plan: Plan, student: Any, preprocessing: Preprocessing
) -> IntegerNetwork:
  """Returns the integer network of a student.

  Args:
    graph: the wiring.
    plan: the student's quantizers, of placement 'integer'.
    student: {'params', 'batch_stats', 'quant'}.
    preprocessing: the student's.
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
  return Layer(node, sources, grid)  # a global pool's depends on the image


def round_biases(network: IntegerNetwork, student: Any) -> dict[str, Any]:
  """Returns the student's params with the integer network's rounded biases.

  With these biases, and kernels on their grid (`quantizers.settle`), the
  fake-quantized and the integer network differ only by float rounding. The
  integer network itself stays the same.

  Args:
    network: from `fold`.
    student: what was folded, {'params', 'batch_stats', 'quant'}.
  """
  params = dict(student['params'])
  for name, layer in network.layers.items():
    if layer.weights is not None:
      unit = np.float64(layer.sources[0].step) * layer.weights.step
      exact = fold_batch_norm(student, layer.node).bias
      # A BatchNorm's bias is one part of the convolution's.
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
  """Returns the codes of the 256 values of a pixel, uint8 [C, 256]."""
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
  """Returns the code of the sum by the codes of both operands, [256, 256].

  ONNX Runtime computes two fused multiply-adds, the second operand first.
  Products and sums are exact in float64, and one rounding to float32 after each
  makes them fused.
  """
  ratio_a, ratio_b = a.step / out.step, b.step / out.step
  zeros = ratio_a * np.float32(a.zero) + ratio_b * np.float32(b.zero)
  codes = np.arange(256, dtype=np.float64)
  y = np.float32(codes * ratio_b + np.float32(out.zero - zeros))
  x = np.float32(codes[:, None] * ratio_a + np.float64(y))
  return np.clip(np.rint(x), out.low, out.high).astype(np.uint8)


class Affine(NamedTuple):
  """A layer with weights as kernel * x * gain + bias.

  Attributes:
    kernel: float32 [..., O].
    gain: float64 [O]; one without BatchNorm.
    bias: float64 [O].
  """

  kernel: np.ndarray
  gain: np.ndarray
  bias: np.ndarray


def fold_batch_norm(variables: Any, node: Node) -> Affine:
  """Returns what a layer with weights computes, BatchNorm folded in.

  Args:
    variables: {'params', 'batch_stats'}.
    node: the layer.
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
  # A bias is a multiple of step * (step of the input), which at few bits is
  # coarse. Larger codes of a smaller step make it finer.
  factor = min(127 // high, _PAIR_LIMIT // (2 * source.high * high))
  factor = max(factor, 1)
  worth = step * np.abs(gain)
  # A gain near zero takes a coarser step, so that the bias fits.
  least = np.abs(bias) * factor / (source.step * _BIAS_LIMIT)
  floor = np.maximum(least, 1e-12)
  codes = np.where(worth < floor, np.rint(codes * worth / floor), codes)
  final = (np.maximum(worth, floor) / factor).astype(np.float32)
  codes = (codes * factor * np.where(gain < 0, -1, 1)).astype(np.int8)
  bias = np.rint(bias / (np.float64(source.step) * final)).astype(np.int32)
  largest = max(source.high - source.zero, source.zero - source.low)
  sums = np.abs(np.int64(codes)).sum(tuple(range(codes.ndim - 1)))
  return Weights(codes, bias, final, factor, largest * sums.max() >= _EXACT)
