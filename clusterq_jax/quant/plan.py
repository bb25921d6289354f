"""Decides where quantizers go and how many bits they have.

There are two placements:

- `paper` quantizes every tensor that feeds a convolution or the classifier.
  Residual adds stay in float.
- `integer` quantizes every layer output, as an integer runtime needs. Tensors
  that feed a convolution have the activation bits. All others have 8 bits.

In both, the inputs of the network and of the classifier have 8 bits, which the
literature leaves in float. Logits are not quantized. Squeeze-excite branches
and lone BatchNorms have weights and inputs of 8 bits; in `paper`, lone
BatchNorms read float. A layer that feeds only a concat has no quantizer of its
own: the concat's quantizes all inputs with one grid.

The range of the network input is the range of pixels, which is known before
calibration. Synthetic images have less contrast than real ones. A range
calibrated on them clips real images, which cost a CIFAR-10 ResNet-20 0.8
percentage points of accuracy at W8A8.

With learned steps, a signed tensor of fewer than 8 bits has its own zero point.
Without one, a skewed tensor would leave some of its few codes unused. The zero
point costs nothing in the integer network, because a byte has room for shifted
codes. Codes of 8 bits fill the byte, so they have no zero point.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clusterq_jax.models.graph import Graph
from clusterq_jax.models.node import Node
from clusterq_jax.quant import numerics

WIDE_BITS = 8
# Activations with values in [0, 1], and all that are never negative.
_FRACTIONS = ('sigmoid', 'hard_sigmoid')
_POSITIVE = ('relu', 'relu6', *_FRACTIONS)


@dataclasses.dataclass(frozen=True)
class Bits:
  """Bit widths and placement of one student.

  Attributes:
    weights: bits of the weights of all layers except the first and the last.
    activations: bits of tensors that feed a convolution.
    first: bits of the first layer's weights.
    last: bits of the last layer's weights.
    placement: 'paper' or 'integer'.
  """

  weights: int
  activations: int
  first: int
  last: int
  placement: str


@dataclasses.dataclass(frozen=True)
class Output:
  """The quantizer on a layer's output.

  Attributes:
    bits: bit width.
    signed: whether negative values occur.
    step: fixed step; None if calibration sets it.
    zero_point: whether calibration also sets a zero point.
  """

  bits: int
  signed: bool
  step: float | None = None
  zero_point: bool = False

  def codes(self, zero_point: Any = None) -> tuple[Any, Any]:
    """Returns the smallest and the largest code.

    Args:
      zero_point: zero point, []; only for a quantizer that has one.
    """
    if self.zero_point:
      return -zero_point, 2**self.bits - 1 - zero_point
    return numerics.activation_range(self.bits, self.signed)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The quantizers of a student; hashable.

  Attributes:
    weights: (layer name, bits) of every layer with weights.
    outputs: (layer name, quantizer) of every quantized output.
    learned: whether steps are stored and learned; see `make_plan`.
  """

  weights: tuple[tuple[str, int], ...]
  outputs: tuple[tuple[str, Output], ...]
  learned: bool

  def weight_bits(self, name: str) -> int:
    """Returns the bits of a layer's weights."""
    return dict(self.weights)[name]

  def output(self, name: str) -> Output | None:
    """Returns the quantizer on a layer's output, or None."""
    return dict(self.outputs).get(name)


def make_plan(
  graph: Graph, bits: Bits, learned: bool, input_limit: float
) -> Plan:
  """Decides every quantizer of a student.

  Args:
    graph: wiring of the architecture.
    bits: bit widths and placement.
    learned: whether steps are stored and learned, beginning at the smallest
      mean squared error. Otherwise, the range of weights follows their largest
      magnitude. The range of activations follows its moving average (EMA).
    input_limit: largest magnitude of the network input, in normalised pixel
      units.
  """
  outputs = {}
  signed = _signed(graph)
  for node in graph.nodes:
    width = _output_bits(graph, node, bits)
    if width is not None:
      step = None
      if node.op == 'input':
        step = input_limit / numerics.activation_range(width, True)[1]
      elif node.act in _FRACTIONS and width == WIDE_BITS:
        # One half, the gate of 0, is a code; with 1 / 255 it would lie between
        # two, and the last bit of a float would decide.
        step = 1 / 2**WIDE_BITS
      shifted = learned and signed[node.name] and width < WIDE_BITS
      outputs[node.name] = Output(width, signed[node.name], step, shifted)
  return Plan(_weights(graph, bits), tuple(outputs.items()), learned)


def _weights(graph: Graph, bits: Bits) -> tuple[tuple[str, int], ...]:
  """Returns (layer name, bits) of every layer with weights."""
  narrow = [name for name in graph.weighted if not _is_wide(graph, name)]
  weights = dict.fromkeys(graph.weighted, WIDE_BITS)
  weights |= dict.fromkeys(narrow, bits.weights)
  weights[narrow[0]] = bits.first
  weights[graph.weighted[-1]] = bits.last
  return tuple(weights.items())


def _is_wide(graph: Graph, name: str) -> bool:
  """Tells whether a layer has 8 bits, whatever the network has.

  Lone BatchNorms have one weight per channel. Squeeze-excite branches have few
  weights and decide about whole channels.
  """
  return graph.node(name).scales or name in graph.gates


def _output_bits(graph: Graph, node: Node, bits: Bits) -> int | None:
  """Returns the bits of a layer's output, or None without a quantizer."""
  consumers = graph.consumers(node.name)
  if node.op == 'dense' or node.moves:
    return None  # logits stay in float; moved values stay on their grid
  if node.op == 'input':
    return WIDE_BITS
  if [consumer.op for consumer in consumers] == ['concat']:
    return None  # the concat quantizes all its inputs with one grid
  convolved = {
    _is_wide(graph, consumer.name)
    for consumer in consumers
    if consumer.op in ('conv_bn', 'conv')
    # Without integers everywhere, a lone BatchNorm computes in float.
    and not (consumer.scales and bits.placement == 'paper')
  }
  if False in convolved:
    return bits.activations
  feeds_dense = any(consumer.op == 'dense' for consumer in consumers)
  if True in convolved or feeds_dense or bits.placement == 'integer':
    return WIDE_BITS
  return None


def _signed(graph: Graph) -> dict[str, bool]:
  """Tells for each layer whether its output can be negative."""
  signed: dict[str, bool] = {}
  for node in graph.nodes:
    if node.averages or node.moves or node.op in ('mul', 'concat'):
      signed[node.name] = any(signed[name] for name in node.inputs)
    else:
      signed[node.name] = node.act not in _POSITIVE
  return signed


def weight_bytes(params: Mapping, plan: Plan) -> float:
  """Returns the size of the parameters in bytes.

  Kernels count with their bits, gains and biases as float32.

  Args:
    params: layer name to the layer's arrays.
    plan: quantizers of the student.
  """
  total = 0.0
  for name, layer in params.items():
    for key, array in layer.items():
      bits = plan.weight_bits(name) if key == 'kernel' else 32
      total += array.size * bits / 8
  return total
