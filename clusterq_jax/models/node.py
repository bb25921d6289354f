"""One layer of a network: what it is, what it reads, and its output's shape."""

import dataclasses
from typing import Any

from clusterq_jax.models import protocol
from clusterq_jax.ops import convolution

Shape = tuple[int, int, int]  # (H, W, C)

_CONV = (
  'features',
  'kernel',
  'strides',
  'padding',
  'dilation',
  'groups',
  'act',
)
# Fields of a node that its factory takes, by op.
OPTIONS: dict[str, tuple[str, ...]] = {
  'input': (),
  'conv_bn': (*_CONV, 'epsilon'),
  'conv': _CONV,
  'dense': ('features',),
  'act': ('act', 'slope'),
  'add': ('act',),
  'mul': (),
  'concat': (),
  'slice': ('start', 'stop'),
  'shuffle': ('groups',),
  'pad': ('padding',),
  'pad_shortcut': ('features', 'strides'),
  'resize': ('factor',),
  'max_pool': ('kernel', 'strides', 'padding'),
  'avg_pool': ('kernel', 'strides', 'padding', 'count_padding'),
  'global_avg_pool': (),
}
_MOVES = (
  'pad_shortcut',
  'max_pool',
  'slice',
  'shuffle',
  'pad',
  'resize',
)


@dataclasses.dataclass(frozen=True)
class Node:
  """One layer of a network.

  Attributes:
    name: name of the layer, also its key in every variable collection.
    op: factory that makes it, as a field name of `LayerSet`.
    inputs: names of the layers whose outputs it reads.
    act: activation; see `LayerSet`.
    features: channels of the output, if the layer chooses them.
    kernel: height and width of a convolution's or pool's window in pixels.
    strides: step of a convolution, pool or shortcut in pixels.
    padding: padding of a convolution or pool, or of `pad`.
    dilation: distance between the taps of a convolution in pixels.
    groups: number of groups of a convolution's or shuffle's channels.
    epsilon: epsilon of a BatchNorm.
    slope: slope of leaky_relu below zero, or elu's limit.
    start: first channel of a slice.
    stop: channel after the last one of a slice.
    factor: factor of a resize.
    count_padding: whether an average pool counts padded zeros.
  """

  name: str
  op: str
  inputs: tuple[str, ...]
  act: protocol.Activation | None = None
  features: int | None = None
  kernel: tuple[int, int] = (1, 1)
  strides: int = 1
  padding: protocol.Padding = None
  dilation: int = 1
  groups: int = 1
  epsilon: float = protocol.EPSILON
  slope: float = protocol.SLOPE
  start: int = 0
  stop: int = 0
  factor: int = 1
  count_padding: bool = False

  @property
  def options(self) -> dict[str, Any]:
    """Returns the arguments of the layer's factory."""
    return {key: getattr(self, key) for key in OPTIONS[self.op]}

  @property
  def moves(self) -> bool:
    """Tells whether values only move; the output stays on the input's grid."""
    return self.op in _MOVES

  @property
  def averages(self) -> bool:
    """Tells whether values are averaged; the output keeps the input's sign."""
    return self.op in ('avg_pool', 'global_avg_pool')

  @property
  def scales(self) -> bool:
    """Tells whether it only scales and shifts channels: a BatchNorm alone."""
    return (
      self.op in ('conv_bn', 'conv')
      and self.kernel == (1, 1)
      and 1 < self.groups == self.features
    )


def output_shape(node: Node, inputs: list[Shape]) -> Shape:
  """Computes the shape of a layer's output from those of its inputs."""
  h, w, c = inputs[0]
  if node.op in ('conv_bn', 'conv', 'max_pool', 'avg_pool'):
    pads = convolution.explicit(
      (h, w), node.kernel, node.strides, node.padding, node.dilation
    )
    sizes = [
      (size + sum(pad) - (side - 1) * node.dilation - 1) // node.strides + 1
      for size, pad, side in zip((h, w), pads, node.kernel, strict=True)
    ]
    if min(sizes) < 1:
      raise ValueError(
        f'its window of {node.kernel[0]}x{node.kernel[1]} pixels does not fit '
        f'a map of {h}x{w}'
      )
    if node.features is not None and (
      c % node.groups or node.features % node.groups
    ):
      raise ValueError(
        f'{node.groups} groups do not divide {c} input and {node.features} '
        'output channels'
      )
    return sizes[0], sizes[1], node.features or c
  if node.op == 'dense':
    assert node.features is not None
    return 1, 1, node.features
  if node.op in ('add', 'mul'):
    return _broadcast(inputs)
  if node.op == 'concat':
    if len({shape[:2] for shape in inputs}) > 1:
      raise ValueError(f'its inputs have different sizes: {_text(inputs)}')
    return h, w, sum(shape[2] for shape in inputs)
  if node.op == 'slice':
    if not 0 <= node.start < node.stop <= c:
      raise ValueError(
        f'channels {node.start} to {node.stop} of an input with {c}'
      )
    return h, w, node.stop - node.start
  if node.op == 'shuffle' and c % node.groups:
    raise ValueError(f'{node.groups} groups do not divide {c} channels')
  if node.op == 'pad':
    (top, bottom), (left, right) = convolution.explicit(
      (h, w), (1, 1), 1, node.padding
    )
    return h + top + bottom, w + left + right, c
  if node.op == 'pad_shortcut':
    assert node.features is not None
    if node.features < c:
      raise ValueError(f'{node.features} channels from {c}')
    return -(-h // node.strides), -(-w // node.strides), node.features
  if node.op == 'resize':
    return h * node.factor, w * node.factor, c
  if node.op == 'global_avg_pool':
    return 1, 1, c
  return h, w, c


def _broadcast(inputs: list[Shape]) -> Shape:
  largest = max(inputs, key=lambda shape: shape[0] * shape[1])
  for shape in inputs:
    if shape != largest and shape != (1, 1, largest[2]):
      raise ValueError(f'its inputs do not fit: {_text(inputs)}')
  return largest


def _text(shapes: list[Shape]) -> str:
  return ', '.join('x'.join(map(str, shape)) for shape in shapes)
