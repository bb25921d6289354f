"""Folds a student into an integer network; runs once, in NumPy."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from clusterq_jax.deploy import tables
from clusterq_jax.deploy.integer import (
  Grid,
  IntegerNetwork,
  Layer,
  Weights,
  window_share,
)
from clusterq_jax.layers import functions
from clusterq_jax.models import protocol
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.node import Node
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
  graph = _vectors_second(graph, preprocessing)
  grids = _grids(graph, plan, student)
  layers = {
    node.name: _layer(node, grids, plan, student, preprocessing)
    for node in graph.nodes
  }
  return IntegerNetwork(graph, layers, preprocessing)


def _vectors_second(graph: Graph, preprocessing: Preprocessing) -> Graph:
  """Puts the map before the vector in sums and products, as runtimes do."""
  shapes = graph.shapes(preprocessing.shape)

  def ordered(node: Node) -> Node:
    if node.op in ('add', 'mul'):
      first, second = node.inputs
      if shapes[first] != shapes[node.name]:
        return dataclasses.replace(node, inputs=(second, first))
    return node

  return dataclasses.replace(graph, nodes=tuple(map(ordered, graph.nodes)))


def _grids(graph: Graph, plan: Plan, student: Any) -> dict[str, Grid]:
  """Returns the grid of each layer's output, but not of the logits.

  A layer without a quantizer feeds only a concat and takes the concat's grid.
  Moved values stay on the grid of their input.
  """
  grids: dict[str, Grid] = {}
  # Backwards, because a concat stands after its inputs.
  for node in reversed(graph.nodes[:-1]):
    if node.moves:
      continue
    own = student['quant'].get(node.name, {})
    found = quantizers.output_grid(plan, node.name, own)
    output = plan.output(node.name)
    if found is None or output is None:
      (concat,) = graph.consumers(node.name)
      grid = grids[concat.name]
    else:
      zero = 128 if output.signed else 0
      low, high = zero + int(found.low), zero + int(found.high)
      grid = Grid(np.float32(found.step), zero, low, high)
    grids[node.name] = _clipped(grid, node)
  for node in graph.nodes:
    if node.moves:
      grids[node.name] = grids[node.inputs[0]]
  return grids


def _clipped(grid: Grid, node: Node) -> Grid:
  """Returns the grid with the ends of a clipping activation."""
  low, high = grid.low, grid.high
  if node.act in protocol.CLIPPING:
    low = max(low, grid.zero)
  if node.act == 'relu6':
    six = int(np.rint(np.float32(functions.RELU6) / grid.step))
    high = min(high, grid.zero + six)
  return grid._replace(low=low, high=high)


def _layer(
  node: Node,
  grids: dict[str, Grid],
  plan: Plan,
  student: Any,
  preprocessing: Preprocessing,
) -> Layer:
  sources = tuple(grids[name] for name in node.inputs)
  if node.op == 'dense':
    weights = _weights(node, sources[0], plan, student)
    return Layer(node, sources, None, weights, sources[0].step * weights.step)
  grid = grids[node.name]
  if node.op in ('conv_bn', 'conv'):
    weights = _weights(node, sources[0], plan, student)
    multiplier = sources[0].step * weights.step / grid.step
    return Layer(node, sources, grid, weights, multiplier)
  if node.op == 'avg_pool':
    multiplier = np.asarray(sources[0].step * window_share(node) / grid.step)
    return Layer(node, sources, grid, multiplier=multiplier)
  if node.op == 'input':
    table = tables.pixels(grid, preprocessing)
    return Layer(node, sources, grid, table=table)
  if node.op == 'act':
    slopes = student['params'].get(node.name, {}).get('slope')
    table = tables.activation(node, sources[0], grid, slopes)
    return Layer(node, sources, grid, table=table, slopes=slopes)
  # The multiplier of a global pool depends on the size of the image.
  return Layer(node, sources, grid, table=_table(node, sources, grid))


def _table(
  node: Node, sources: tuple[Grid, ...], grid: Grid
) -> np.ndarray | None:
  """Returns the table of a layer with other inputs; None if it has none."""
  if node.op in ('add', 'mul'):
    first, second = sources
    make = tables.add if node.op == 'add' else tables.multiply
    return make(first, second, grid)
  if node.op == 'concat':
    return tables.requantized(sources, grid)
  return None


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
  sums = np.abs(np.int64(codes)).sum(tuple(range(codes.ndim - 1)))
  return Weights(codes, bias, final, factor, _parts(source, int(sums.max())))


def _parts(source: Grid, weight: int) -> int:
  """Returns the parts of input codes that keep float32 sums exact.

  Args:
    source: grid of the input.
    weight: largest sum of a channel's absolute weight codes.
  """
  largest = max(source.high - source.zero, source.zero - source.low)
  parts = 1
  while largest * weight >= _EXACT and parts < 8:
    parts *= 2
    largest = 2 ** (8 // parts) - 1
  return parts
