"""The graph of a network: what its layers are, and what each one reads.

The graph is the network. Teacher and student files carry it in their headers
(`graph_file`), `network.Network` builds it with any layer set, and bit widths
and places of quantizers follow from it (`quant/plan.py`).
"""

import dataclasses
import functools
from collections.abc import Callable

from flax import linen as nn

from clusterq_jax.models import protocol
from clusterq_jax.models.node import OPTIONS, Node, Shape, output_shape
from clusterq_jax.ops import convolution


@dataclasses.dataclass(frozen=True)
class Graph:
  """A network: its layers in forward order.

  Attributes:
    nodes: the layers. The first is the input, the last the classifier.
    image_shape: (H, W, C) of the only images that the network takes; None if
      it takes any. Shapes of an imported network are frozen.
  """

  nodes: tuple[Node, ...]
  image_shape: Shape | None = None

  @functools.cached_property
  def _by_name(self) -> dict[str, Node]:
    return {node.name: node for node in self.nodes}

  @functools.cached_property
  def _readers(self) -> dict[str, tuple[Node, ...]]:
    readers: dict[str, tuple[Node, ...]] = {n.name: () for n in self.nodes}
    for node in self.nodes:
      for name in dict.fromkeys(node.inputs):
        readers[name] += (node,)
    return readers

  @functools.cached_property
  def _channels(self) -> dict[str, int]:
    found: dict[str, int] = {}
    if self.image_shape is not None:
      found[self.nodes[0].name] = self.image_shape[2]
    for node in self.nodes:
      if node.features is not None:
        found[node.name] = node.features
      elif node.op == 'slice':
        found[node.name] = node.stop - node.start
      elif all(name in found for name in node.inputs) and node.inputs:
        counts = [found[name] for name in node.inputs]
        found[node.name] = sum(counts) if node.op == 'concat' else counts[0]
    return found

  def node(self, name: str) -> Node:
    """Returns the layer of that name."""
    return self._by_name[name]

  def channels(self, name: str) -> int:
    """Returns the channels of a layer's output.

    Raises:
      KeyError: they are those of the images, and the network takes any.
    """
    return self._channels[name]

  @functools.cached_property
  def batch_norms(self) -> tuple[str, ...]:
    """Returns the names of layers with a BatchNorm, in forward order."""
    return tuple(n.name for n in self.nodes if n.op == 'conv_bn')

  @functools.cached_property
  def weighted(self) -> tuple[str, ...]:
    """Returns the names of layers with weights, in forward order."""
    return tuple(
      n.name for n in self.nodes if n.op in ('conv_bn', 'conv', 'dense')
    )

  @functools.cached_property
  def vectors(self) -> frozenset[str]:
    """Returns the layers after a global pool, whose outputs are vectors."""
    found: set[str] = set()
    for node in self.nodes:
      if node.op == 'global_avg_pool' or (
        node.inputs and found.issuperset(node.inputs)
      ):
        found.add(node.name)
    return frozenset(found)

  @functools.cached_property
  def gates(self) -> frozenset[str]:
    """Returns the layers of squeeze-excite branches.

    These are the vectors that reach a product with a feature map through
    vectors only.
    """
    found: set[str] = set()
    for node in reversed(self.nodes):
      gated = node.op in ('mul', 'add') and node.name not in self.vectors
      if gated or node.name in found:
        found |= self.vectors.intersection(node.inputs)
    return frozenset(found)

  @functools.cached_property
  def last_stage(self) -> frozenset[str]:
    """Returns the layers at the last BatchNorm's resolution."""
    scales: dict[str, float] = {}
    for node in self.nodes:
      scale = max((scales[name] for name in node.inputs), default=1.0)
      scales[node.name] = scale * node.strides / node.factor
    return frozenset(
      node.name
      for node in self.nodes
      if node.op in ('conv_bn', 'conv', 'add', 'act', 'mul', 'concat')
      and node.name not in self.gates
      and scales[node.name] == scales[self.batch_norms[-1]]
    )

  def readers(self, name: str) -> tuple[Node, ...]:
    """Returns the layers that read an output."""
    return self._readers[name]

  def consumers(self, name: str) -> tuple[Node, ...]:
    """Returns the layers that compute with an output, also after moves."""
    found: dict[str, Node] = {}
    pending, seen = [name], {name}
    while pending:
      for node in self._readers[pending.pop()]:
        if not node.moves:
          found[node.name] = node
        elif node.name not in seen:
          seen.add(node.name)
          pending.append(node.name)
    return tuple(found.values())

  def shapes(self, image_shape: Shape | None = None) -> dict[str, Shape]:
    """Computes the shape of each layer's output.

    Args:
      image_shape: (H, W, C) of the images; None takes the graph's own.

    Returns:
      (H, W, C) by layer name, in forward order; logits are (1, 1, K).

    Raises:
      ValueError: a layer cannot take its inputs. The message names it.
    """
    image_shape = image_shape or self.image_shape
    assert image_shape is not None, 'the graph takes any image'
    found: dict[str, Shape] = {}
    for node in self.nodes:
      inputs = [found[name] for name in node.inputs] or [image_shape]
      try:
        found[node.name] = output_shape(node, inputs)
      except ValueError as e:
        raise ValueError(f'{node.op} {node.name}: {e}') from e
    return found

  def variable_shapes(
    self, image_shape: Shape | None = None
  ) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """Computes the shapes of the variables of the float network.

    Args:
      image_shape: (H, W, C) of the images; None takes the graph's own.

    Returns:
      {'params', 'batch_stats'} -> layer -> leaf -> shape.

    Raises:
      ValueError: see `shapes`.
    """
    image_shape = image_shape or self.image_shape
    shapes = self.shapes(image_shape)
    params: dict[str, dict[str, tuple[int, ...]]] = {}
    stats: dict[str, dict[str, tuple[int, ...]]] = {}
    for node in self.nodes:
      h, w, c = shapes[node.inputs[0]] if node.inputs else (0, 0, 0)
      out = shapes[node.name][2:]
      if node.op in ('conv_bn', 'conv'):
        kernel = (*node.kernel, c // node.groups, *out)
        params[node.name] = {'kernel': kernel, 'bias': out}
      elif node.op == 'dense':
        params[node.name] = {'kernel': (h * w * c, *out), 'bias': out}
      elif node.act == 'prelu':
        params[node.name] = {'slope': out}
      if node.op == 'conv_bn':
        params[node.name]['scale'] = out
        stats[node.name] = {'mean': out, 'var': out}
    return {'params': params, 'batch_stats': stats}


def trace(build: Callable[[protocol.LayerSet], nn.Module]) -> Graph:
  """Reads the graph off a Linen module, without any array.

  While the module runs, each tensor is the name of the layer that made it.

  Args:
    build: makes the network from a layer set.

  Raises:
    ValueError: two layers have the same name.
  """
  nodes: dict[str, Node] = {}

  def recorder(op: str) -> protocol.Layer:
    def factory(*args, name: str, **options):
      options |= dict(zip(OPTIONS[op], args, strict=False))
      if op == 'avg_pool':
        options.setdefault('padding', 0)
      if 'kernel' in options:
        options['kernel'] = convolution.window(options['kernel'])

      def layer(*inputs: str) -> str:
        if name in nodes:
          raise ValueError(f'two layers are called {name!r}')
        if op == 'input':
          inputs = ()
        nodes[name] = Node(name, op, inputs, **options)
        return name

      return layer

    return factory

  fields = [f.name for f in dataclasses.fields(protocol.LayerSet)]
  build(protocol.LayerSet(**{op: recorder(op) for op in fields})).apply(
    {}, 'image'
  )
  return Graph(tuple(nodes.values()))
