"""Tables of how each source names and orders a network's tensors.

There is one table for each source and family of architectures. It maps our
layer names to the source's prefixes. A file must fit a table exactly; nothing
is guessed.

Sources: github.com/akamaster/pytorch_resnet_cifar10, torchvision (timm's
ResNets have its names), github.com/huggingface/pytorch-image-models (`timm`),
github.com/osmr/imgclsmob (`pytorchcv`), PyPI `efficientnet-lite-pytorch`, and
this package's own safetensors files.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.models import registry

STEM, CLASSIFIER = 'stem', 'classifier'
COLLECTIONS = {
  'kernel': 'params',
  'scale': 'params',
  'bias': 'params',
  'mean': 'batch_stats',
  'var': 'batch_stats',
}
_TORCH_LEAVES = {
  'kernel': '{conv}.weight',
  'scale': '{bn}.weight',
  'bias': '{bn}.bias',
  'mean': '{bn}.running_mean',
  'var': '{bn}.running_var',
}
_OWN_LEAVES = {k: f'{c}/{{conv}}/{k}' for k, c in COLLECTIONS.items()}


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer with weights.

  Attributes:
    name: name of the layer in our architecture.
    kernel: shape of the kernel in Flax order; None for sizes that the file
      decides.
    block: number of its residual block, from 1; 0 outside of blocks.
  """

  name: str
  kernel: tuple[int | None, ...]
  block: int = 0

  @property
  def shapes(self) -> dict[str, tuple[int | None, ...]]:
    """Returns the shape of each leaf in Flax order."""
    leaves = COLLECTIONS if len(self.kernel) == 4 else ('kernel', 'bias')
    return {
      k: self.kernel if k == 'kernel' else self.kernel[-1:] for k in leaves
    }


@dataclasses.dataclass(frozen=True)
class Layout:
  """A source's mapping table.

  Attributes:
    name: name of the source.
    rows: maps a layer's name, or its part after the block's name, to two
      prefixes: of its convolution or dense layer, and of its BatchNorm (or its
      bias if it has none). Prefixes can contain these fields:
        {n} number of the block in the network, from 1; {m} from 0
        {s} number of the stage, from 1; {r} from 0
        {b} number of the block in its stage, from 1; {i} from 0
    leaves: maps a leaf of a Flax layer to its name in the file, which can
      contain {conv} and {bn}, the two prefixes.
    stages: blocks in each stage, if the source divides stages differently.
    torch_order: whether kernels are [cout, cin, kh, kw] and [cout, cin].
    options: fields of architectures that the source decides.
    conv_classifier: whether the classifier is a 1x1 convolution without bias.
  """

  name: str
  rows: Mapping[str, tuple[str, str]]
  leaves: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: _TORCH_LEAVES
  )
  stages: tuple[int, ...] = ()
  torch_order: bool = True
  options: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  conv_classifier: bool = False

  def key(self, layer: Layer, leaf: str) -> str:
    """Returns the name of one tensor of a layer in a file of this layout.

    Raises:
      InputError: the layer has no row, or its row has unknown fields.
    """
    found = re.fullmatch(r'stage(\d+)_block(\d+)_(\w+)', layer.name)
    fields: dict[str, int] = {}
    row = layer.name
    if found:
      s, b = int(found[1]), int(found[2])
      if self.stages:
        s, b = _place(layer.block, self.stages)
      fields = {'s': s, 'r': s - 1, 'b': b, 'i': b - 1}
      fields |= {'n': layer.block, 'm': layer.block - 1}
      row = layer.name if layer.name in self.rows else found[3]
    if not self.rows:  # a file of our own has our names
      return self.leaves[leaf].format(conv=layer.name)
    try:
      conv, bn = (prefix.format(**fields) for prefix in self.rows[row])
    except LookupError as e:
      raise InputError(
        f'{self.name}: the layer {layer.name!r} has no row, or one with '
        f'unknown fields; expected {", ".join(fields) or "none"}'
      ) from e
    return self.leaves[leaf].format(conv=conv, bn=bn)

  def matches(self, keys: Iterable[str]) -> int:
    """Returns the number of keys that this layout can produce."""
    rows = self.rows.values() or [(r'{n}', r'{n}')]
    patterns = [
      re.sub(r'\\\{\w\\\}', r'\\w+', re.escape(leaf.format(conv=conv, bn=bn)))
      for conv, bn in rows
      for leaf in self.leaves.values()
    ]
    known = re.compile('|'.join(patterns))
    return sum(bool(known.fullmatch(key)) for key in keys)

  def to_source(self, shape: tuple) -> tuple:
    """Permutes the Flax shape of a leaf to this layout's order."""
    if self.torch_order and len(shape) == 4:
      return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] if self.torch_order else shape

  def in_flax_order(self, value: np.ndarray) -> np.ndarray:
    """Returns a view in Flax order: [kh, kw, cin, cout] or [cin, cout]."""
    if not self.torch_order:
      return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T

  def to_flax(self, value: np.ndarray) -> np.ndarray:
    """Returns a contiguous copy in Flax order."""
    return np.ascontiguousarray(self.in_flax_order(value))


def _place(block: int, stages: tuple[int, ...]) -> tuple[int, int]:
  """Returns a block's stage and its number in the stage, both from 1."""
  for stage, blocks in enumerate(stages, 1):
    if block <= blocks:
      return stage, block
    block -= blocks
  return len(stages), block + stages[-1]


def _layout(
  name: str,
  block: str,
  rows: Mapping[str, tuple[str, str]],
  others: Mapping[str, tuple[str, str]],
  **fields,
) -> Layout:
  """Makes a layout from rows in blocks, with the prefix `block`, and others."""
  pairs = {key: (block + conv, block + bn) for key, (conv, bn) in rows.items()}
  return Layout(name, {**pairs, **others}, **fields)


def _pytorchcv(
  rows: Mapping[str, str], others: Mapping[str, str] | None = None, **fields
) -> Layout:
  """Makes a layout whose convolutions are `x.conv` and BatchNorms `x.bn`."""

  def pairs(prefixes):
    return {key: (f'{p}.conv', f'{p}.bn') for key, p in prefixes.items()}

  outside = pairs({STEM: 'features.init_block', **(others or {})})
  outside[CLASSIFIER] = ('output', 'output')
  unit = 'features.stage{s}.unit{b}.'
  return _layout('pytorchcv', unit, pairs(rows), outside, **fields)


_CONVS = {f'conv{i}': (f'conv{i}', f'bn{i}') for i in (1, 2, 3)}
_BODY = {
  'conv1': 'body.conv1',
  'conv2': 'body.conv2',
  'shortcut': 'identity_conv',
}
OWN = Layout('clusterq', {}, _OWN_LEAVES, torch_order=False)
# Where several layouts have equally many keys of a file, the first is taken.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
  'cifar_resnet': (
    _layout(
      'akamaster',
      'layer{s}.{i}.',
      {'conv1': ('conv1', 'bn1'), 'conv2': ('conv2', 'bn2')},
      {
        STEM: ('conv1', 'bn1'),
        'shortcut': ('layer{s}.0.shortcut.0', 'layer{s}.0.shortcut.1'),
        CLASSIFIER: ('linear', 'linear'),
      },
    ),
    _pytorchcv(_BODY),
    OWN,
  ),
  'resnet': (
    _layout(
      'torchvision',
      'layer{s}.{i}.',
      {**_CONVS, 'shortcut': ('downsample.0', 'downsample.1')},
      {STEM: ('conv1', 'bn1'), CLASSIFIER: ('fc', 'fc')},
    ),
    _pytorchcv(
      {**_BODY, 'conv3': 'body.conv3'},
      {STEM: 'features.init_block.conv'},
      # pytorchcv calls torchvision's ResNet-50 resnet50b.
      options={'resnet50': {'stride_first': True}},
    ),
    OWN,
  ),
  'mobilenet_v2': (
    _layout(
      'torchvision',
      'features.{n}.conv.',
      {
        'stage1_block1_depthwise': ('0.0', '0.1'),
        'stage1_block1_project': ('1', '2'),
        'expand': ('0.0', '0.1'),
        'depthwise': ('1.0', '1.1'),
        'project': ('2', '3'),
      },
      {
        STEM: ('features.0.0', 'features.0.1'),
        'head': ('features.18.0', 'features.18.1'),
        CLASSIFIER: ('classifier.1', 'classifier.1'),
      },
    ),
    _layout(
      'timm',
      'blocks.{r}.{i}.',
      {
        'stage1_block1_depthwise': ('conv_dw', 'bn1'),
        'stage1_block1_project': ('conv_pw', 'bn2'),
        'expand': ('conv_pw', 'bn1'),
        'depthwise': ('conv_dw', 'bn2'),
        'project': ('conv_pwl', 'bn3'),
      },
      {
        STEM: ('conv_stem', 'bn1'),
        'head': ('conv_head', 'bn2'),
        CLASSIFIER: ('classifier', 'classifier'),
      },
    ),
    _pytorchcv(
      {'expand': 'conv1', 'depthwise': 'conv2', 'project': 'conv3'},
      {'head': 'features.final_block'},
      stages=(1, 2, 3, 7, 4),
      options={'mobilenet_v2': {'expand_first': True}},
      conv_classifier=True,
    ),
    OWN,
  ),
  'efficientnet_lite': (
    _layout(
      'efficientnet-lite-pytorch',
      '_blocks.{m}.',
      {
        'expand': ('_expand_conv', '_bn0'),
        'depthwise': ('_depthwise_conv', '_bn1'),
        'project': ('_project_conv', '_bn2'),
      },
      {
        STEM: ('_conv_stem', '_bn0'),
        'head': ('_conv_head', '_bn1'),
        CLASSIFIER: ('_fc', '_fc'),
      },
    ),
    OWN,
  ),
}


def known(arch: str) -> tuple[Layout, ...]:
  """Returns the layouts known for an architecture's weights.

  Raises:
    InputError: no architecture has that name.
  """
  architecture = registry.architecture(arch)
  if architecture.rows is not None:
    return Layout(arch, architecture.rows), OWN
  return LAYOUTS[architecture.family]
