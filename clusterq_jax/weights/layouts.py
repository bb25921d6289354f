"""How each source names and orders a network's tensors, and the strict check.

One table per source and family of architectures: from our layer names to the
source's prefixes. What a file must hold is read off the architecture's own
definition, given a few facts found in the file (input channels, classes, kind
of shortcut); whatever is missing, left over or of another shape is reported in
one line.

Sources: github.com/akamaster/pytorch_resnet_cifar10, torchvision (timm's
ResNets have its names), github.com/huggingface/pytorch-image-models (`timm`),
github.com/osmr/imgclsmob (`pytorchcv`), PyPI `efficientnet-lite-pytorch`, and
this package's own safetensors files.

Left out: guessing. A file that fits no table exactly is refused.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.layers import float as float_layers
from clusterq_jax.layers import protocol
from clusterq_jax.models import registry
from clusterq_jax.weights import files

FORMAT = 'clusterq-jax teacher 1'

_STEM, _CLASSIFIER = 'stem', 'classifier'
# As timm, pytorchcv, torchvision and PyPI `efficientnet-pytorch` call it.
_SQUEEZE = re.compile(r'(^|\.)(_?se|_?se_\w+)\.|\.block\.\d+\.fc1\.')
_COLLECTIONS = {
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
_OWN_LEAVES = {k: f'{c}/{{conv}}/{k}' for k, c in _COLLECTIONS.items()}


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer with weights.

  Attributes:
    name: of the layer, in our architecture.
    kernel: shape, in Flax order; None where the file has the say.
    block: number of its residual block, from 1; 0 outside of blocks.
    depthwise: whether each channel has a kernel of its own.
  """

  name: str
  kernel: tuple[int | None, ...]
  block: int = 0

  @property
  def shapes(self) -> dict[str, tuple[int | None, ...]]:
    """Leaf name -> shape in Flax order."""
    leaves = _COLLECTIONS if len(self.kernel) == 4 else ('kernel', 'bias')
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

  def to_flax(self, value: np.ndarray) -> np.ndarray:
    """[cout, cin/groups, kh, kw] -> [kh, kw, cin/groups, cout], and so on."""
    if self.torch_order:
      value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return np.ascontiguousarray(value)


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
      _STEM: 'features.init_block',
      **{name: unit + row for name, row in rows.items()},
      **(extra or {}),
    }.items()
  }
  pairs[_CLASSIFIER] = ('output', 'output')
  return Layout('pytorchcv', pairs, **others)


def _torchvision(rows: Mapping[str, tuple[str, str]], **others) -> Layout:
  block = 'layer{s}.{i}.'
  pairs = {
    name: (block + conv, block + bn) for name, (conv, bn) in rows.items()
  }
  pairs |= {_STEM: ('conv1', 'bn1'), _CLASSIFIER: ('fc', 'fc')}
  return Layout('torchvision', pairs, **others)


_CONVS = {f'conv{i}': (f'conv{i}', f'bn{i}') for i in (1, 2, 3)}
_OWN = Layout('clusterq', {}, _OWN_LEAVES, torch_order=False)
# The first layout is named where a file fits none.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
  'cifar_resnet': (
    Layout(
      'akamaster',
      {
        _STEM: ('conv1', 'bn1'),
        'conv1': ('layer{s}.{i}.conv1', 'layer{s}.{i}.bn1'),
        'conv2': ('layer{s}.{i}.conv2', 'layer{s}.{i}.bn2'),
        'shortcut': ('layer{s}.0.shortcut.0', 'layer{s}.0.shortcut.1'),
        _CLASSIFIER: ('linear', 'linear'),
      },
    ),
    _pytorchcv(
      {
        'conv1': 'body.conv1',
        'conv2': 'body.conv2',
        'shortcut': 'identity_conv',
      }
    ),
    _OWN,
  ),
  'resnet': (
    _torchvision({**_CONVS, 'shortcut': ('downsample.0', 'downsample.1')}),
    _pytorchcv(
      {
        **{name: f'body.{name}' for name in _CONVS},
        'shortcut': 'identity_conv',
      },
      extra={_STEM: 'features.init_block.conv'},
      # Its resnet50b is torchvision's.
      options={'resnet50': {'stride_first': True}},
    ),
    _OWN,
  ),
  'mobilenet_v2': (
    Layout(
      'torchvision',
      {
        _STEM: ('features.0.0', 'features.0.1'),
        'stage1_block1_depthwise': (
          'features.{n}.conv.0.0',
          'features.{n}.conv.0.1',
        ),
        'stage1_block1_project': ('features.{n}.conv.1', 'features.{n}.conv.2'),
        'expand': ('features.{n}.conv.0.0', 'features.{n}.conv.0.1'),
        'depthwise': ('features.{n}.conv.1.0', 'features.{n}.conv.1.1'),
        'project': ('features.{n}.conv.2', 'features.{n}.conv.3'),
        'head': ('features.18.0', 'features.18.1'),
        _CLASSIFIER: ('classifier.1', 'classifier.1'),
      },
    ),
    Layout(
      'timm',
      {
        _STEM: ('conv_stem', 'bn1'),
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
        _CLASSIFIER: ('classifier', 'classifier'),
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
    _OWN,
  ),
  'efficientnet_lite': (
    Layout(
      'efficientnet-lite-pytorch',
      {
        _STEM: ('_conv_stem', '_bn0'),
        'expand': ('_blocks.{m}._expand_conv', '_blocks.{m}._bn0'),
        'depthwise': ('_blocks.{m}._depthwise_conv', '_blocks.{m}._bn1'),
        'project': ('_blocks.{m}._project_conv', '_blocks.{m}._bn2'),
        'head': ('_conv_head', '_bn1'),
        _CLASSIFIER: ('_fc', '_fc'),
      },
    ),
    _OWN,
  ),
}


def known(arch: str) -> tuple[Layout, ...]:
  """The layouts of an architecture's weights.

  Raises:
    InputError: no such architecture.
  """
  architecture = registry.architecture(arch)
  if architecture.rows is not None:
    return Layout(arch, architecture.rows), _OWN
  return LAYOUTS[architecture.family]


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A teacher's weights and what the file says about them.

  Attributes:
    variables: {'params', 'batch_stats'} -> layer -> leaf, float32; kernels
      [kh, kw, cin/groups, cout] or [cin, cout], the other leaves [cout].
    options: 'in_channels' and fields of the architecture, 'num_classes' first.
    metadata: the strings in the file's header.
    layout: the name of the source's layout.
    report: one paragraph for the log.
  """

  variables: dict[str, dict[str, dict[str, np.ndarray]]]
  options: dict[str, Any]
  metadata: dict[str, str]
  layout: str
  report: str


def load(path: str | os.PathLike[str], arch: str) -> Loaded:
  """Reads the weights of one architecture and refuses all that does not fit.

  Args:
    path: a file that `files.read_tensors` takes.
    arch: a name from `models.registry`.

  Raises:
    InputError: an unknown architecture, an unreadable file, entries missing,
      left over or of another shape, no BatchNorm statistics, or a negative
      variance.
  """
  path = os.fspath(path)
  layouts = known(arch)
  tensors, metadata = files.read_tensors(path)
  _check_kind(path, tensors)
  layout = max(layouts, key=lambda layout: layout.matches(tensors))
  if 2 * layout.matches(tensors) < len(tensors):
    raise InputError(
      f'{path}: found tensors of no layout known for {arch} '
      f'({files.names(tensors, 3)}), '
      f'expected one of {", ".join(layout.name for layout in layouts)}; '
      f'{_supported()}'
    )
  if not layout.torch_order:
    _check_metadata(path, metadata, arch)
  if layout.conv_classifier:
    tensors = _as_dense(layout, tensors)
  in_channels, options = _options(arch, layout, tensors, metadata)
  layers = _layers(registry.architecture(arch), in_channels, **options)
  if layout.torch_order:
    _check_order(path, layout, layers, tensors)
  _check(path, arch, layout, in_channels, options, tensors)
  variables: dict[str, dict[str, dict[str, np.ndarray]]] = {
    'params': {},
    'batch_stats': {},
  }
  for layer in layers:
    for leaf in layer.shapes:
      value = layout.to_flax(tensors[layout.key(layer, leaf)])
      group = variables[_COLLECTIONS[leaf]]
      group.setdefault(layer.name, {})[leaf] = value
  bn = variables['batch_stats'].values()
  count = sum(v.size for p in variables['params'].values() for v in p.values())
  details = [
    f'{in_channels} input channels',
    f'{options["num_classes"]} classes',
  ]
  details += [
    f'{name.replace("_", " ")} {value}'
    for name, value in options.items()
    if name != 'num_classes'
  ]
  report = (
    f'{path}: {arch} in the {layout.name} layout, {", ".join(details)}; '
    f'{count:,} parameters, {len(bn)} BatchNorm layers with '
    f'{sum(s["mean"].size for s in bn):,} channels.'
  )
  return Loaded(
    variables,
    {'in_channels': in_channels, **options},
    metadata,
    layout.name,
    report,
  )


@functools.cache
def _layers(
  architecture: registry.Architecture, in_channels: int | None, **options
) -> list[Layer]:
  """The layers of an architecture, as its own definition has them."""
  classes = options['num_classes']
  options['num_classes'] = classes or 1

  def build(layers):
    return architecture.network(layers=layers, **options)

  network = build(float_layers.layer_set())
  # The classifier's width may depend on it.
  size = architecture.preprocessing.get('image_size', (64, 64))
  images = jax.ShapeDtypeStruct((1, *size, in_channels or 1), np.float32)
  params = jax.eval_shape(network.init, jax.random.key(0), images)['params']
  layers: list[Layer] = []
  blocks: list[str] = []
  names = protocol.trace(build).weighted
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
    layers.append(Layer(name, shape, block))
  return layers


def _as_dense(
  layout: Layout, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  classifier = Layer(_CLASSIFIER, (None,) * 2)
  kernel, bias = (layout.key(classifier, leaf) for leaf in ('kernel', 'bias'))
  tensors = dict(tensors)
  found = tensors.get(kernel)
  if found is not None and found.shape[2:] == (1, 1) and bias not in tensors:
    tensors[kernel] = found[:, :, 0, 0]
    tensors[bias] = np.zeros(len(found), np.float32)
  return tensors


def _options(
  arch: str,
  layout: Layout,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str],
) -> tuple[int | None, dict[str, Any]]:
  """Input channels and fields of the architecture, as the file decides them.

  None where the deciding tensor is missing.
  """

  def dim(layer: Layer, axis: int) -> int | None:
    value = tensors.get(layout.key(layer, 'kernel'))
    if value is None or value.ndim != len(layer.kernel):
      return None
    return layout.to_flax(value).shape[axis]

  graph = protocol.trace(registry.builder(arch, num_classes=1))
  first, last = graph.weighted[0], graph.weighted[-1]
  options: dict[str, Any] = {
    'num_classes': dim(Layer(last, (None,) * 2), 1),
    **layout.options.get(arch, {}),
  }
  family = registry.architecture(arch).family
  if family == 'cifar_resnet':
    shortcuts = [
      Layer(f'stage{s}_block1_shortcut', (None,) * 4) for s in (2, 3)
    ]
    conv = any(layout.key(layer, 'kernel') in tensors for layer in shortcuts)
    options['shortcut'] = 'conv' if conv else 'pad'
  if layout is _OWN:  # what other sources decide, a converted file tells
    names = {
      name for other in known(arch) for name in other.options.get(arch, {})
    }
    options |= {name: True for name in names if metadata.get(name) == 'true'}
  return dim(Layer(first, (None,) * 4), 2), options


def _supported() -> str:
  return f'supported networks are {", ".join(registry.names())}'


def _check_kind(path: str, tensors: Mapping[str, np.ndarray]) -> None:
  """Refuses what no network here has, or lacks what each has."""
  if not any(re.search(r'(\.running_|/)mean$', key) for key in tensors):
    raise InputError(
      f'{path}: found no BatchNorm statistics (no running_mean among '
      f'{len(tensors)} tensors): group or layer normalisation, or none; the '
      f'method needs a teacher with BatchNorm statistics; {_supported()}'
    )
  squeeze = [key for key in tensors if _SQUEEZE.search(key)]
  if squeeze:
    raise InputError(
      f'{path}: squeeze-and-excitation ({files.names(squeeze, 1)}) is not '
      f'supported; {_supported()}'
    )


def _check_order(
  path: str,
  layout: Layout,
  layers: list[Layer],
  tensors: Mapping[str, np.ndarray],
) -> None:
  """Refuses torch's names with the kernels of TensorFlow."""
  kernels = {}
  for layer in layers:
    key, bias = (layout.key(layer, leaf) for leaf in ('kernel', 'bias'))
    if len(layer.kernel) == 4 and {key, bias} <= tensors.keys():
      kernels[key] = tensors[key].shape, tensors[bias].size
  if kernels and all(
    len(shape) == 4 and shape[0] != cout and cout in shape[2:]
    for shape, cout in kernels.values()
  ):
    key, (shape, _) = next(iter(kernels.items()))
    raise InputError(
      f'{path}: kernels are transposed ({key} is {list(shape)}): found '
      "TensorFlow's order [height, width, in, out], expected torch's [out, in, "
      'height, width], and [out, in] for the classifier'
    )


def _check_metadata(path: str, metadata: dict[str, str], arch: str) -> None:
  if metadata.get('format') != FORMAT:
    raise InputError(
      f'{path}: metadata format is {metadata.get("format")!r}, expected '
      f'{FORMAT!r}'
    )
  if metadata.get('arch') != arch:
    found = metadata.get('arch')
    raise InputError(
      f'{path}: metadata arch is {found!r}, expected {arch!r}'
      + (
        f'; set config.teacher.arch={found}'
        if found in registry.names()
        else ''
      )
    )


def _differences(
  layout: Layout, layers: list[Layer], tensors: Mapping[str, np.ndarray]
) -> tuple[list[str], list[str], list[str]]:
  """Missing and unexpected keys, and descriptions of the mis-shaped ones."""
  expected = {
    layout.key(layer, leaf): layout.to_source(shape)
    for layer in layers
    for leaf, shape in layer.shapes.items()
  }
  shapes = []
  for key, want in expected.items():
    got = tensors[key].shape if key in tensors else want
    if len(got) != len(want) or any(
      w not in (None, g) for w, g in zip(want, got, strict=True)
    ):
      shapes.append(f'{key} is {list(got)}, expected {list(want)}')
  missing = [key for key in expected if key not in tensors]
  return missing, [key for key in tensors if key not in expected], shapes


def _check(
  path: str,
  arch: str,
  layout: Layout,
  in_channels: int | None,
  options: dict[str, Any],
  tensors: Mapping[str, np.ndarray],
) -> None:
  def differences(arch):
    # The sources' own choices belong to an architecture, not to its family.
    found = {
      k: v for k, v in options.items() if k in ('num_classes', 'shortcut')
    }
    found |= layout.options.get(arch, {})
    layers = _layers(registry.architecture(arch), in_channels, **found)
    return _differences(layout, layers, tensors)

  layers = _layers(registry.architecture(arch), in_channels, **options)
  found = _differences(layout, layers, tensors)
  if any(found):
    kinds = ('missing', 'unexpected', 'of another shape')
    parts = [
      f'{len(entries)} {kind}' + f' ({files.names(entries)})' * bool(entries)
      for entries, kind in zip(found, kinds, strict=True)
    ]
    message = f'{path} does not fit {arch}: {", ".join(parts)}'
    # Another one is named only where the whole file fits it.
    for other in registry.names(registry.architecture(arch).family):
      if not any(differences(other)):
        message += (
          f'; the file holds a {other}; set config.teacher.arch={other}'
        )
        break
    else:
      message += f'; {_supported()}'
    raise InputError(message)
  for layer in layers:
    for leaf in layer.shapes:
      key = layout.key(layer, leaf)
      value = tensors[key]
      if value.dtype != np.float32:
        raise InputError(f'{path}: {key} is {value.dtype}, expected a float')
      if leaf == 'var' and (value < 0).any():
        raise InputError(
          f'{path}: {key} has {(value < 0).sum()} negative variance(s) of '
          f'{value.size}, expected none'
        )
