"""The wiring of a network, read off the architecture's own code.

Bit widths and places of quantizers are decided from it (`quant/plan.py`).
"""

import dataclasses
import functools
from collections.abc import Callable

from flax import linen as nn

from clusterq_jax.models import protocol


@dataclasses.dataclass(frozen=True)
class Node:
  """One layer of the wiring.

  Attributes:
    name: name of the layer, also its key in every variable collection.
    op: factory that made it, as a field name of `LayerSet`.
    inputs: names of the layers whose outputs it reads.
    act: activation applied to its output.
    features: channels of its output; None if its input has as many.
    kernel: side of a convolution's or pool's window in pixels.
    strides: step of a convolution, pool or shortcut in pixels.
    padding: padding of a convolution or pool, as in `LayerSet`.
    groups: number of groups of a convolution's channels.
    epsilon: epsilon of a convolution's BatchNorm.
  """

  name: str
  op: str
  inputs: tuple[str, ...]
  act: protocol.Activation = None
  features: int | None = None
  kernel: int = 1
  strides: int = 1
  padding: protocol.Padding = None
  groups: int = 1
  epsilon: float = protocol.EPSILON

  @property
  def moves(self) -> bool:
    """Tells whether values only move; the output stays on the input's grid."""
    return self.op in ('pad_shortcut', 'max_pool')

  @property
  def averages(self) -> bool:
    """Tells whether values are averaged; the output keeps the input's sign."""
    return self.op in ('avg_pool', 'global_avg_pool')


@dataclasses.dataclass(frozen=True)
class Graph:
  """The wiring of a network: its layers in forward order."""

  nodes: tuple[Node, ...]

  def node(self, name: str) -> Node:
    """Returns the layer of that name."""
    return next(n for n in self.nodes if n.name == name)

  def channels(self, name: str) -> int:
    """Returns the channels of a layer's output; the input layer has none."""
    node = self.node(name)
    return node.features or self.channels(node.inputs[0])

  @functools.cached_property
  def batch_norms(self) -> tuple[str, ...]:
    """Returns the names of layers with a BatchNorm, in forward order."""
    return tuple(n.name for n in self.nodes if n.op == 'conv_bn')

  @functools.cached_property
  def last_stage(self) -> frozenset[str]:
    """Returns convolutions and adds at the last convolution's resolution."""
    scales: dict[str, int] = {}
    for node in self.nodes:
      scale = max(scales.get(name, 1) for name in node.inputs)
      scales[node.name] = scale * node.strides
    return frozenset(
      node.name
      for node in self.nodes
      if node.op in ('conv_bn', 'add')
      and scales[node.name] == scales[self.batch_norms[-1]]
    )

  @functools.cached_property
  def weighted(self) -> tuple[str, ...]:
    """Returns the names of layers with weights, in forward order."""
    return tuple(n.name for n in self.nodes if n.op in ('conv_bn', 'dense'))

  def consumers(self, name: str) -> tuple[Node, ...]:
    """Returns the layers that compute with an output, also after moves."""
    found: tuple[Node, ...] = ()
    for node in self.nodes:
      if name in node.inputs:
        found += self.consumers(node.name) if node.moves else (node,)
    return found


def trace(build: Callable[[protocol.LayerSet], nn.Module]) -> Graph:
  """Reads the wiring off an architecture, without any array.

  While the network runs, each tensor is the name of the layer that made it.

  Args:
    build: makes the network from a layer set.

  Raises:
    ValueError: two layers have the same name.
  """
  nodes: list[Node] = []

  def recorder(op: str) -> protocol.Layer:
    def factory(*args, name: str, **options):
      options |= dict(zip(('features', 'kernel'), args, strict=False))

      def layer(*inputs: str) -> str:
        if any(node.name == name for node in nodes):
          raise ValueError(f'two layers are called {name!r}')
        nodes.append(Node(name, op, inputs, **options))
        return name

      return layer

    return factory

  fields = [f.name for f in dataclasses.fields(protocol.LayerSet)]
  build(protocol.LayerSet(**{op: recorder(op) for op in fields})).apply(
    {}, 'image'
  )
  return Graph(tuple(nodes))
