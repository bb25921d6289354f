"""The layer protocol: what an architecture may be built from.

A network in `models/` is a Linen module with a `layers: LayerSet` attribute and
uses nothing but the factories below, each with an explicit `name`. Which set it
is given decides what the network becomes: `float.py` makes the teacher,
`fake_quant.py` the student, and the recorder in this file makes no network at
all but a `Graph`: the wiring, read off the architecture's own code, from which
bit widths and quantizer places are decided (`quant/plan.py`).

Left out: anything that no network here needs yet.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from flax import linen as nn

from clusterq_jax.ops.convolution import Padding

Activation = Literal['relu', 'relu6'] | None
Layer = Callable[..., Any]
EPSILON = 1e-5  # of BatchNorm, torch's default


@dataclasses.dataclass(frozen=True)
class LayerSet:
  """Factories of layers; hashable, so that it can be a module attribute.

  Attributes:
    input: `input(name=)(x)`: entry of the network, x [B, H, W, C].
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


@dataclasses.dataclass(frozen=True)
class Node:
  """One layer of the wiring.

  Attributes:
    name: the layer's name, also its key in every variable collection.
    op: the factory it came from, as a field name of `LayerSet`.
    inputs: names of the layers whose outputs it reads.
    act: activation applied to its output.
    features: channels of its output, where the layer chooses them.
    kernel, strides, padding, groups: of a convolution or pool, as in
      `LayerSet`; `strides` also of a shortcut.
    epsilon: of a convolution's BatchNorm.
  """

  name: str
  op: str
  inputs: tuple[str, ...]
  act: Activation = None
  features: int | None = None
  kernel: int = 1
  strides: int = 1
  padding: Padding = None
  groups: int = 1
  epsilon: float = EPSILON

  @property
  def moves(self) -> bool:
    """Whether values only move: the output is on the input's grid."""
    return self.op in ('pad_shortcut', 'max_pool')

  @property
  def averages(self) -> bool:
    """Whether values are averaged: the output has the input's sign."""
    return self.op in ('avg_pool', 'global_avg_pool')


@dataclasses.dataclass(frozen=True)
class Graph:
  """The wiring of a network: its layers in forward order."""

  nodes: tuple[Node, ...]

  def node(self, name: str) -> Node:
    return next(n for n in self.nodes if n.name == name)

  def channels(self, name: str) -> int:
    """Channels of a layer's output; not of the network's input."""
    node = self.node(name)
    return node.features or self.channels(node.inputs[0])

  @functools.cached_property
  def batch_norms(self) -> tuple[str, ...]:
    """Names of the layers that hold a BatchNorm, in forward order."""
    return tuple(n.name for n in self.nodes if n.op == 'conv_bn')

  @functools.cached_property
  def last_stage(self) -> frozenset[str]:
    """Convolutions and adds at the resolution of the last convolution."""
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
    """Names of the layers that hold weights, in forward order."""
    return tuple(n.name for n in self.nodes if n.op in ('conv_bn', 'dense'))

  def consumers(self, name: str) -> tuple[Node, ...]:
    """The layers that compute with an output, moved or not."""
    found: tuple[Node, ...] = ()
    for node in self.nodes:
      if name in node.inputs:
        found += self.consumers(node.name) if node.moves else (node,)
    return found


def trace(build: Callable[[LayerSet], nn.Module]) -> Graph:
  """Reads the wiring off an architecture, without any array.

  Args:
    build: makes the network from a layer set.

  Returns:
    The graph. Tensors are represented by the name of the layer that made them.
  """
  nodes: list[Node] = []

  def recorder(op: str) -> Layer:
    def factory(*args, name: str, **options):
      options |= dict(zip(('features', 'kernel'), args, strict=False))

      def layer(*inputs: str) -> str:
        if any(node.name == name for node in nodes):
          raise ValueError(f'two layers are called {name!r}')
        nodes.append(Node(name, op, inputs, **options))
        return name

      return layer

    return factory

  fields = [f.name for f in dataclasses.fields(LayerSet)]
  build(LayerSet(**{op: recorder(op) for op in fields})).apply({}, 'image')
  return Graph(tuple(nodes))
