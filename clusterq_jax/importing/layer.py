"""The layers that a program is translated to, before they become a graph."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Shape = tuple[int, int, int]  # (C, H, W), in torch's order
UNPADDED = ((0, 0), (0, 0))


@dataclasses.dataclass(eq=False)
class Layer:
  """One layer; passes change it.

  Attributes:
    op: an op of `models.graph`, or one that the passes remove: 'batch_norm',
      'affine' (x * factor + shift per channel), 'subsample' (every n-th row and
      m-th column), 'crop' (fewer rows and columns), 'pad_channels' (zeros
      before and after), 'output'.
    inputs: the layers that it reads.
    shape: shape of its output.
    options: fields of its `node.Node`, or of the op that a pass removes.
    arrays: its variables by leaf, kernels [kh, kw, I / groups, O].
    name: name that the layer should get.
    where: the operator and the module that it comes from, for messages.
  """

  op: str
  inputs: list['Layer']
  shape: Shape
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  name: str = ''
  where: str = ''

  @property
  def is_vector(self) -> bool:
    """Tells whether its output is one number per channel."""
    return self.shape[1:] == (1, 1)


Counts = dict[Layer, int]


def rewrite(
  layers: list[Layer], rule: Callable[[Layer, Counts], Layer]
) -> list[Layer]:
  """Applies a rule to each layer in forward order; drops what nobody reads.

  Args:
    layers: in forward order, 'output' last.
    rule: takes a layer and the number of readers of each layer. Returns the
      layer that takes its place: itself, or one before it.
  """
  counts: Counts = dict.fromkeys(layers, 0)
  for layer in layers:
    for source in layer.inputs:
      counts[source] += 1
  placed: dict[Layer, Layer] = {}
  kept = []
  for layer in layers:
    layer.inputs = [placed[source] for source in layer.inputs]
    new = rule(layer, counts)
    placed[layer] = new
    if new is layer:
      kept.append(layer)
    elif new in layer.inputs:
      counts[new] += counts[layer] - 1
  return _alive(kept)


def _alive(layers: list[Layer]) -> list[Layer]:
  needed = {layers[-1]}
  for layer in reversed(layers):
    if layer in needed or layer.op == 'input':
      needed.update(layer.inputs)
  return [layer for layer in layers if layer in needed or layer.op == 'input']


def per_channel(
  values: np.ndarray, shape: tuple[int, ...], channels: int
) -> np.ndarray | None:
  """Returns one number per channel for a constant that meets a feature map.

  Args:
    values: the constant, of any shape that torch would broadcast.
    shape: torch's shape of the feature map, [N, C, ...].
    channels: C.

  Returns:
    [C], or None if the constant differs between pixels or images, or if the
    result would be larger than the map.
  """
  if values.ndim > len(shape):
    return None
  values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
  for axis, size in enumerate(values.shape):
    if size not in (1, shape[axis]):
      return None
    if axis != 1:
      first = values.take([0], axis) if size else values
      if size != 1 and not (values == first).all():
        return None
      values = first
  if not np.isfinite(values).all() or values.shape[1] not in (1, channels):
    return None
  return np.broadcast_to(values.reshape(-1), (channels,)).astype(np.float64)


def product(sizes: Iterable[int]) -> int:
  """Returns the product of sizes, exactly."""
  result = 1
  for size in sizes:
    result *= size
  return result
