"""Where quantizers go and how many bits they have: policy, apart from numerics.

Two placements. `paper`: every tensor that feeds a convolution or the classifier
is quantized, residual adds stay in float. `integer`: every layer output is,
with the activation bits where it feeds a convolution, else 8, which is what an
integer runtime executes. In both, network input and classifier input have 8
bits (the literature leaves these two in float), and logits stay as they are.

The range of the input is that of pixels, known beforehand. Set from synthetic
images, whose contrast is lower, it clips real ones: that cost a CIFAR-10
ResNet-20 0.8 points at W8A8.

A signed tensor of fewer than 8 bits has a zero point of its own, where steps
are learned: the codes of a skewed one are too few to leave any unused. Within a
byte there is room for its codes around 128, so that it costs nothing; 8 bits
fill the byte.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clusterq_jax.models.graph import Graph, Node
from clusterq_jax.quant import numerics

WIDE_BITS = 8


@dataclasses.dataclass(frozen=True)
class Bits:
  """Bit widths and placement of one student.

  Attributes:
    weights: of every layer but first and last.
    activations: of tensors that feed a convolution.
    first: of the first layer's weights.
    last: of the last layer's weights.
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
    step: the step where it is known beforehand; None: calibrated.
    zero_point: whether it has a zero point of its own, calibrated too.
  """

  bits: int
  signed: bool
  step: float | None = None
  zero_point: bool = False

  def codes(self, zero_point: Any = None) -> tuple[Any, Any]:
    """Smallest and largest code.

    Args:
      zero_point: scalar, of a quantizer that has its own.
    """
    if self.zero_point:
      return -zero_point, 2**self.bits - 1 - zero_point
    return numerics.activation_range(self.bits, self.signed)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What each layer of a student does, by layer name; hashable."""

  weights: tuple[tuple[str, int], ...]
  outputs: tuple[tuple[str, Output], ...]
  learned: bool

  def weight_bits(self, name: str) -> int:
    return dict(self.weights)[name]

  def output(self, name: str) -> Output | None:
    return dict(self.outputs).get(name)


def make_plan(
  graph: Graph, bits: Bits, learned: bool, input_limit: float
) -> Plan:
  """Decides every quantizer of a student.

  Args:
    graph: the architecture's wiring.
    bits: bit widths and placement.
    learned: step sizes are stored and learned (from the MSE-optimal clip);
      otherwise weight ranges follow the weights' largest magnitude, activation
      ranges an EMA of the same.
    input_limit: largest magnitude that a pixel has as network input.
  """
  weights = dict.fromkeys(graph.weighted, bits.weights)
  weights[graph.weighted[0]] = bits.first
  weights[graph.weighted[-1]] = bits.last
  outputs = {}
  for node in graph.nodes:
    width = _output_bits(graph, node, bits)
    if width is not None:
      signed = _signed(graph, node)
      step = None
      if node.op == 'input':
        step = input_limit / numerics.activation_range(width, signed)[1]
      shifted = learned and signed and width < WIDE_BITS
      outputs[node.name] = Output(width, signed, step, shifted)
  return Plan(tuple(weights.items()), tuple(outputs.items()), learned)


def _output_bits(graph: Graph, node: Node, bits: Bits) -> int | None:
  feeds = {consumer.op for consumer in graph.consumers(node.name)}
  if node.op == 'dense' or node.moves:
    return None  # logits; and what only moves keeps its input's grid
  if node.op == 'input':
    return WIDE_BITS
  if 'conv_bn' in feeds:
    return bits.activations
  if 'dense' in feeds or bits.placement == 'integer':
    return WIDE_BITS
  return None


def _signed(graph: Graph, node: Node) -> bool:
  if node.averages or node.moves:
    sources = [n for n in graph.nodes if n.name in node.inputs]
    return any(_signed(graph, source) for source in sources)
  return node.act is None


def weight_bytes(params: Mapping, plan: Plan) -> float:
  """Bytes of the weights at their bits; gains and biases as float32."""
  total = 0.0
  for name, layer in params.items():
    for key, array in layer.items():
      bits = plan.weight_bits(name) if key == 'kernel' else 32
      total += array.size * bits / 8
  return total
