"""How each source names and orders a network's tensors.

One table per source and family of architectures: from our layer names to the
source's prefixes.

Sources: github.com/akamaster/pytorch_resnet_cifar10, torchvision (timm's
ResNets have its names), github.com/huggingface/pytorch-image-models (`timm`),
github.com/osmr/imgclsmob (`pytorchcv`), PyPI `efficientnet-lite-pytorch`, and
this package's own safetensors files.

Left out: guessing. A file that fits no table exactly is refused.
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
    name: of the layer, in our architecture.
    kernel: shape, in Flax order; None where the file has the say.
    block: number of its residual block, from 1; 0 outside of blocks.
  """

  name: str
  kernel: tuple[int | None, ...]
  block: int = 0

  @property
  def shapes(self) -> dict[str, tuple[int | None, ...]]:
    """Leaf name -> shape in Flax order."""
    leaves = COLLECTIONS if len(self.kernel) == 4 else ('kernel', 'bias')
    return {
      k: self.kernel if k == 'kernel' else self.kernel[-1:] for k in leaves
    }


@dataclasses.dataclass(frozen=True)
class Layout:
  """A source's mapping table.

  Attributes:
    name: the source.
    rows: a layer's name, or what it is called after its block's name -> (prefix
      of its convolution or dense layer, prefix of its BatchNorm, or of its bias
      where there is none), with the fields {n}, number of the block from 1,
      {m} from 0; {s} stage from 1, {r} from 0; {b} block in the stage from 1,
      {i} from 0.
    leaves: leaf of a Flax layer -> name in the file, from {conv} and {bn}.
    stages: blocks in each stage, where the source counts other stages than we.
    torch_order: kernels are [cout, cin, kh, kw] and [cout, cin].
    options: fields of architectures that the source decides.
    conv_classifier: the classifier is a 1x1 convolution without bias.
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
    """The name of one tensor of a layer in a file of this layout."""
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
    if not self.rows:  # our own names
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
    """Counts the keys that this layout could have made."""
    rows = self.rows.values() or [(r'{n}', r'{n}')]
    patterns = [
      re.sub(r'\\\{\w\\\}', r'\\w+', re.escape(leaf.format(conv=conv, bn=bn)))
      for conv, bn in rows
      for leaf in self.leaves.values()
    ]
    known = re.compile('|'.join(patterns))
    return sum(bool(known.fullmatch(key)) for key in keys)

  def to_source(self, shape: tuple) -> tuple:
    """A kernel's or vector's Flax shape in this layout's order."""
    if self.torch_order and len(shape) == 4:
      return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] if self.torch_order else shape

  def in_flax_order(self, value: np.ndarray) -> np.ndarray:
    """A view: [cout, cin/groups, kh, kw] as [kh, kw, cin/groups, cout], ..."""
    if not self.torch_order:
      return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T

  def to_flax(self, value: np.ndarray) -> np.ndarray:
    """A copy in Flax's order."""
    return np.ascontiguousarray(self.in_flax_order(value))


def _place(block: int, stages: tuple[int, ...]) -> tuple[int, int]:
  """Stage and place in it, from 1, of a block."""
  for stage, blocks in enumerate(stages, 1):
    if block <= blocks:
      return stage, block
    block -= blocks
  return len(stages), block + stages[-1]


def _pytorchcv(
  rows: Mapping[str, str], extra: Mapping[str, str] | None = None, **others
) -> Layout:
  """Unit by unit: a convolution is `x.conv`, its BatchNorm `x.bn`."""
  unit = 'features.stage{s}.unit{b}.'
  pairs = {
    name: (f'{prefix}.conv', f'{prefix}.bn')
    for name, prefix in {
      STEM: 'features.init_block',
      **{name: unit + row for name, row in rows.items()},
      **(extra or {}),
    }.items()
  }
  pairs[CLASSIFIER] = ('output', 'output')
  return Layout('pytorchcv', pairs, **others)


def _torchvision(rows: Mapping[str, tuple[str, str]], **others) -> Layout:
  block = 'layer{s}.{i}.'
  pairs = {
    name: (block + conv, block + bn) for name, (conv, bn) in rows.items()
  }
  pairs |= {STEM: ('conv1', 'bn1'), CLASSIFIER: ('fc', 'fc')}
  return Layout('torchvision', pairs, **others)


_CONVS = {f'conv{i}': (f'conv{i}', f'bn{i}') for i in (1, 2, 3)}
OWN = Layout('clusterq', {}, _OWN_LEAVES, torch_order=False)
# The first layout is named where a file fits none.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
  'cifar_resnet': (
    Layout(
      'akamaster',
      {
        STEM: ('conv1', 'bn1'),
        'conv1': ('layer{s}.{i}.conv1', 'layer{s}.{i}.bn1'),
        'conv2': ('layer{s}.{i}.conv2', 'layer{s}.{i}.bn2'),
        'shortcut': ('layer{s}.0.shortcut.0', 'layer{s}.0.shortcut.1'),
        CLASSIFIER: ('linear', 'linear'),
      },
    ),
    _pytorchcv(
      {
        'conv1': 'body.conv1',
        'conv2': 'body.conv2',
        'shortcut': 'identity_conv',
      }
    ),
    OWN,
  ),
  'resnet': (
    _torchvision({**_CONVS, 'shortcut': ('downsample.0', 'downsample.1')}),
    _pytorchcv(
      {
        **{name: f'body.{name}' for name in _CONVS},
        'shortcut': 'identity_conv',
      },
      extra={STEM: 'features.init_block.conv'},
      # Its resnet50b is torchvision's.
      options={'resnet50': {'stride_first': True}},
    ),
    OWN,
  ),
  'mobilenet_v2': (
    Layout(
      'torchvision',
      {
        STEM: ('features.0.0', 'features.0.1'),
        'stage1_block1_depthwise': (
          'features.{n}.conv.0.0',
          'features.{n}.conv.0.1',
        ),
        'stage1_block1_project': ('features.{n}.conv.1', 'features.{n}.conv.2'),
        'expand': ('features.{n}.conv.0.0', 'features.{n}.conv.0.1'),
        'depthwise': ('features.{n}.conv.1.0', 'features.{n}.conv.1.1'),
        'project': ('features.{n}.conv.2', 'features.{n}.conv.3'),
        'head': ('features.18.0', 'features.18.1'),
        CLASSIFIER: ('classifier.1', 'classifier.1'),
      },
    ),
    Layout(
      'timm',
      {
        STEM: ('conv_stem', 'bn1'),
        'stage1_block1_depthwise': (
          'blocks.{r}.{i}.conv_dw',
          'blocks.{r}.{i}.bn1',
        ),
        'stage1_block1_project': (
          'blocks.{r}.{i}.conv_pw',
          'blocks.{r}.{i}.bn2',
        ),
        'expand': ('blocks.{r}.{i}.conv_pw', 'blocks.{r}.{i}.bn1'),
        'depthwise': ('blocks.{r}.{i}.conv_dw', 'blocks.{r}.{i}.bn2'),
        'project': ('blocks.{r}.{i}.conv_pwl', 'blocks.{r}.{i}.bn3'),
        'head': ('conv_head', 'bn2'),
        CLASSIFIER: ('classifier', 'classifier'),
      },
    ),
    _pytorchcv(
      {
        'expand': 'conv1',
        'depthwise': 'conv2',
        'project': 'conv3',
      },
      extra={'head': 'features.final_block'},
      stages=(1, 2, 3, 7, 4),
      options={'mobilenet_v2': {'expand_first': True}},
      conv_classifier=True,
    ),
    OWN,
  ),
  'efficientnet_lite': (
    Layout(
      'efficientnet-lite-pytorch',
      {
        STEM: ('_conv_stem', '_bn0'),
        'expand': ('_blocks.{m}._expand_conv', '_blocks.{m}._bn0'),
        'depthwise': ('_blocks.{m}._depthwise_conv', '_blocks.{m}._bn1'),
        'project': ('_blocks.{m}._project_conv', '_blocks.{m}._bn2'),
        'head': ('_conv_head', '_bn1'),
        CLASSIFIER: ('_fc', '_fc'),
      },
    ),
    OWN,
  ),
}


def known(arch: str) -> tuple[Layout, ...]:
  """The layouts of an architecture's weights.

  Raises:
    InputError: no such architecture.
  """
  architecture = registry.architecture(arch)
  if architecture.rows is not None:
    return Layout(arch, architecture.rows), OWN
  return LAYOUTS[architecture.family]
