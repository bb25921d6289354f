"""Compares the tensors of a file with those that an architecture needs.

The architecture's own definition gives the layers and shapes. The file decides
a few options: input channels, number of classes, kind of shortcut.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from clusterq_jax.layers import float_layers
from clusterq_jax.models import registry
from clusterq_jax.models.graph import trace
from clusterq_jax.weights import layouts


@functools.cache
def layers_of(
  architecture: registry.Architecture, in_channels: int | None, **options
) -> list[layouts.Layer]:
  """Lists the layers with weights of an architecture, in forward order.

  Args:
    architecture: the architecture.
    in_channels: channels of the input images; None if unknown.
    **options: fields of the network; `num_classes` is None if unknown.
  """
  classes = options['num_classes']
  options['num_classes'] = classes or 1

  def build(layers):
    return architecture.network(layers=layers, **options)

  network = build(float_layers.layer_set())
  # The image size can decide how many features the classifier takes.
  size = architecture.preprocessing.get('image_size', (64, 64))
  images = jax.ShapeDtypeStruct((1, *size, in_channels or 1), np.float32)
  params = jax.eval_shape(network.init, jax.random.key(0), images)['params']
  layers: list[layouts.Layer] = []
  blocks: list[str] = []
  names = trace(build).weighted
  for name in names:
    shape: tuple[int | None, ...] = params[name]['kernel'].shape
    if name == names[0]:
      shape = (*shape[:2], in_channels, shape[3])
    if name == names[-1]:
      shape = (shape[0], classes)
    found = re.match(r'stage\d+_block\d+', name)
    if found and found[0] not in blocks:
      blocks.append(found[0])
    block = blocks.index(found[0]) + 1 if found else 0
    layers.append(layouts.Layer(name, shape, block))
  return layers


@dataclasses.dataclass(frozen=True)
class Match:
  """The tensors of a file beside the architecture that they may fit.

  Attributes:
    arch: name of the architecture.
    layout: layout of the file.
    in_channels: channels of the input images; None if the file does not tell.
    options: fields of the architecture; `num_classes` is None if the file does
      not tell.
    tensors: tensors of the file by key.
  """

  arch: str
  layout: layouts.Layout
  in_channels: int | None
  options: dict[str, Any]
  tensors: Mapping[str, np.ndarray]

  @property
  def layers(self) -> list[layouts.Layer]:
    """Returns the layers of the architecture that hold weights."""
    architecture = registry.architecture(self.arch)
    return layers_of(architecture, self.in_channels, **self.options)

  def differences(self) -> tuple[list[str], list[str], list[str]]:
    """Returns missing keys, unexpected keys and descriptions of bad shapes."""
    expected = {
      self.layout.key(layer, leaf): self.layout.to_source(shape)
      for layer in self.layers
      for leaf, shape in layer.shapes.items()
    }
    shapes = []
    for key, want in expected.items():
      got = self.tensors[key].shape if key in self.tensors else want
      if len(got) != len(want) or any(
        w not in (None, g) for w, g in zip(want, got, strict=True)
      ):
        shapes.append(f'{key} is {list(got)}, expected {list(want)}')
    missing = [key for key in expected if key not in self.tensors]
    unexpected = [key for key in self.tensors if key not in expected]
    return missing, unexpected, shapes

  def with_arch(self, arch: str) -> 'Match':
    """Returns the same tensors beside another architecture of the family."""
    # The options that a source decides depend on the architecture.
    options = {
      k: v for k, v in self.options.items() if k in ('num_classes', 'shortcut')
    }
    options |= self.layout.options.get(arch, {})
    return dataclasses.replace(self, arch=arch, options=options)


def match(
  arch: str,
  layout: layouts.Layout,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str],
) -> Match:
  """Puts tensors beside the architecture whose options they decide.

  Args:
    arch: name of the architecture.
    layout: layout of the tensors.
    tensors: tensors by key, without shared prefixes.
    metadata: strings in the file's header.
  """
  if layout.conv_classifier:
    tensors = _as_dense(layout, tensors)

  def dim(layer: layouts.Layer, axis: int) -> int | None:
    value = tensors.get(layout.key(layer, 'kernel'))
    if value is None or value.ndim != len(layer.kernel):
      return None
    return layout.in_flax_order(value).shape[axis]

  wiring = trace(registry.builder(arch, num_classes=1))
  first = layouts.Layer(wiring.weighted[0], (None,) * 4)
  last = layouts.Layer(wiring.weighted[-1], (None,) * 2)
  options: dict[str, Any] = {
    'num_classes': dim(last, 1),
    **layout.options.get(arch, {}),
  }
  if registry.architecture(arch).family == 'cifar_resnet':
    shortcuts = [
      layouts.Layer(f'stage{s}_block1_shortcut', (None,) * 4) for s in (2, 3)
    ]
    conv = any(layout.key(layer, 'kernel') in tensors for layer in shortcuts)
    options['shortcut'] = 'conv' if conv else 'pad'
  if layout is layouts.OWN:
    # A converted file records the options that its source decided.
    for other in layouts.known(arch):
      for name in other.options.get(arch, {}):
        if metadata.get(name) == 'true':
          options[name] = True
  return Match(arch, layout, dim(first, 2), options, tensors)


def _as_dense(
  layout: layouts.Layout, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Turns a 1x1 convolution at the end into a dense layer with zero bias."""
  classifier = layouts.Layer(layouts.CLASSIFIER, (None,) * 2)
  kernel, bias = (layout.key(classifier, leaf) for leaf in ('kernel', 'bias'))
  tensors = dict(tensors)
  found = tensors.get(kernel)
  if found is not None and found.shape[2:] == (1, 1) and bias not in tensors:
    tensors[kernel] = found[:, :, 0, 0]
    tensors[bias] = np.zeros(len(found), np.float32)
  return tensors
