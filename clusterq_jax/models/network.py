"""The Linen module of a graph."""

import functools

import jax
from flax import linen as nn

from clusterq_jax.models import protocol
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.registry import Builder


class Network(nn.Module):
  """Builds the layers of a graph with a layer set, and runs them.

  Attributes:
    layers: factories of the layers.
    graph: the network.
  """

  layers: protocol.LayerSet
  graph: Graph

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] to logits [B, K]."""
    values: dict[str, jax.Array] = {}
    for node in self.graph.nodes:
      layer = getattr(self.layers, node.op)(**node.options, name=node.name)
      inputs = [values[name] for name in node.inputs] or [x]
      values[node.name] = layer(*inputs)
    return values[self.graph.nodes[-1].name]


def builder(graph: Graph) -> Builder:
  """Returns a function that makes the network from a layer set."""
  return functools.partial(Network, graph=graph)
