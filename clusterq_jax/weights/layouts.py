"""How each source names and orders a network's tensors, and the strict check.

One table per source: from our layer names to the source's prefixes. What a file
must hold is read off the architecture's own definition, given three facts found
in the file (input channels, classes, kind of shortcut); whatever is missing,
left over or of another shape is reported in one line.

Sources: github.com/akamaster/pytorch_resnet_cifar10, github.com/osmr/imgclsmob
(`pytorchcv`), and this package's own safetensors files.

Left out: guessing. A file that fits no table exactly is refused.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.layers import float as float_layers
from clusterq_jax.layers import protocol
from clusterq_jax.models import registry
from clusterq_jax.weights import files

FORMAT = 'clusterq-jax teacher 1'

_STEM = 'stem'
_CONV1 = 'stage{s}_block{b}_conv1'
_CONV2 = 'stage{s}_block{b}_conv2'
_SHORTCUT = 'stage{s}_block{b}_shortcut'
_CLASSIFIER = 'classifier'
_TEMPLATES = {'conv1': _CONV1, 'conv2': _CONV2, 'shortcut': _SHORTCUT}

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
  """A layer of an architecture: its name is `template` filled with (s, b)."""

  template: str
  kernel: tuple[int | None, ...]  # Flax order; None where the file has no say.
  s: int = 0
  b: int = 1

  def fill(self, template: str) -> str:
    return template.format(s=self.s, b=self.b, i=self.b - 1)

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
    rows: template of our layer name -> (prefix of its convolution or dense
      layer, prefix of its BatchNorm, or of its bias where there is none), with
      the fields {s} stage from 1, {b} block from 1, {i} block from 0.
    leaves: leaf of a Flax layer -> name in the file, from {conv} and {bn}.
    torch_order: kernels are [cout, cin, kh, kw] and [cout, cin].
  """

  name: str
  rows: Mapping[str, tuple[str, str]]
  leaves: Mapping[str, str]
  torch_order: bool = True

  def key(self, layer: Layer, leaf: str) -> str:
    """The name of one tensor of a layer in a file of this layout."""
    conv, bn = map(layer.fill, self.rows[layer.template])
    return self.leaves[leaf].format(conv=conv, bn=bn)

  def matches(self, keys: Iterable[str], template: str | None = None) -> int:
    """Counts the keys that this layout (or one row of it) could have made."""
    rows = [self.rows[template]] if template else self.rows.values()
    patterns = [
      re.sub(r'\\\{\w\\\}', r'\\d+', re.escape(leaf.format(conv=conv, bn=bn)))
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


LAYOUTS = (
  Layout(
    name='akamaster',
    rows={
      _STEM: ('conv1', 'bn1'),
      _CONV1: ('layer{s}.{i}.conv1', 'layer{s}.{i}.bn1'),
      _CONV2: ('layer{s}.{i}.conv2', 'layer{s}.{i}.bn2'),
      _SHORTCUT: ('layer{s}.0.shortcut.0', 'layer{s}.0.shortcut.1'),
      _CLASSIFIER: ('linear', 'linear'),
    },
    leaves=_TORCH_LEAVES,
  ),
  Layout(
    name='pytorchcv',
    rows={
      _STEM: ('features.init_block.conv', 'features.init_block.bn'),
      _CONV1: (
        'features.stage{s}.unit{b}.body.conv1.conv',
        'features.stage{s}.unit{b}.body.conv1.bn',
      ),
      _CONV2: (
        'features.stage{s}.unit{b}.body.conv2.conv',
        'features.stage{s}.unit{b}.body.conv2.bn',
      ),
      _SHORTCUT: (
        'features.stage{s}.unit1.identity_conv.conv',
        'features.stage{s}.unit1.identity_conv.bn',
      ),
      _CLASSIFIER: ('output', 'output'),
    },
    leaves=_TORCH_LEAVES,
  ),
  Layout(
    name='clusterq',
    rows={t: (t, t) for t in (_STEM, _CONV1, _CONV2, _SHORTCUT, _CLASSIFIER)},
    leaves=_OWN_LEAVES,
    torch_order=False,
  ),
)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A teacher's weights and what the file says about them.

  Attributes:
    variables: {'params', 'batch_stats'} -> layer -> leaf, float32; kernels
      [kh, kw, cin/groups, cout] or [cin, cout], the other leaves [cout].
    options: 'in_channels', 'num_classes' and 'shortcut' ('pad' or 'conv').
    metadata: the strings in the file's header.
    layout: the name of the source's layout.
    report: one paragraph for the log.
  """

  variables: dict[str, dict[str, dict[str, np.ndarray]]]
  options: dict[str, int | str]
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
  if arch not in registry.names():
    raise InputError(
      f'no weights for arch {arch!r}, expected {", ".join(registry.names())}'
    )
  tensors, metadata = files.read_tensors(path)
  if not any(re.search(r'(\.running_|/)mean$', key) for key in tensors):
    raise InputError(
      f'{path}: found no BatchNorm statistics (no running_mean among '
      f'{len(tensors)} tensors); the method needs a teacher with BatchNorm '
      f'statistics'
    )
  layout = max(LAYOUTS, key=lambda layout: layout.matches(tensors))
  if 2 * layout.matches(tensors) < len(tensors):
    raise InputError(
      f'{path}: found tensors of no known layout ({files.names(tensors, 3)}), '
      f'expected one of {", ".join(layout.name for layout in LAYOUTS)}'
    )
  if not layout.torch_order:
    _check_metadata(path, metadata, arch)
  options = _options(layout, tensors)
  layers = _layers(arch, **options)
  _check(path, arch, layout, layers, options, tensors)
  variables: dict[str, dict[str, dict[str, np.ndarray]]] = {
    'params': {},
    'batch_stats': {},
  }
  for layer in layers:
    for leaf in layer.shapes:
      value = layout.to_flax(tensors[layout.key(layer, leaf)])
      group = variables[_COLLECTIONS[leaf]]
      group.setdefault(layer.fill(layer.template), {})[leaf] = value
  bn = variables['batch_stats'].values()
  count = sum(v.size for p in variables['params'].values() for v in p.values())
  report = (
    f'{path}: {arch} in the {layout.name} layout, {options["in_channels"]} '
    f'input channels, {options["num_classes"]} classes, {options["shortcut"]} '
    f'shortcuts; {count:,} parameters, {len(bn)} BatchNorm layers with '
    f'{sum(s["mean"].size for s in bn):,} channels.'
  )
  return Loaded(variables, options, metadata, layout.name, report)


def _layers(
  arch: str,
  in_channels: int | None,
  num_classes: int | None,
  shortcut: str,
) -> list[Layer]:
  """The layers of an architecture, as its own definition has them."""
  build = registry.builder(
    arch, num_classes=num_classes or 1, shortcut=shortcut
  )
  network = build(float_layers.layer_set())
  images = jax.ShapeDtypeStruct((1, 32, 32, in_channels or 1), np.float32)
  params = jax.eval_shape(network.init, jax.random.key(0), images)['params']
  layers = []
  for name in protocol.trace(build).weighted:
    shape: tuple[int | None, ...] = params[name]['kernel'].shape
    if name == _STEM:
      shape = (*shape[:2], in_channels, shape[3])
    if name == _CLASSIFIER:
      shape = (shape[0], num_classes)
    found = re.fullmatch(r'stage(\d+)_block(\d+)_(\w+)', name)
    if found:
      s, b, kind = found.groups()
      layers.append(Layer(_TEMPLATES[kind], shape, int(s), int(b)))
    else:
      layers.append(Layer(name, shape))
  return layers


def _options(layout: Layout, tensors: Mapping[str, np.ndarray]) -> dict:
  """What the file itself decides; None where the deciding tensor is missing."""

  def dim(layer: Layer, axis: int) -> int | None:
    value = tensors.get(layout.key(layer, 'kernel'))
    if value is None or value.ndim != len(layer.kernel):
      return None
    return layout.to_flax(value).shape[axis]

  conv = layout.matches(tensors, _SHORTCUT)
  return {
    'in_channels': dim(Layer(_STEM, (None,) * 4), 2),
    'num_classes': dim(Layer(_CLASSIFIER, (None,) * 2), 1),
    'shortcut': 'conv' if conv else 'pad',
  }


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
  layers: list[Layer],
  options: dict,
  tensors: Mapping[str, np.ndarray],
) -> None:
  found = _differences(layout, layers, tensors)
  if any(found):
    kinds = ('missing', 'unexpected', 'of another shape')
    parts = [
      f'{len(entries)} {kind}' + f' ({files.names(entries)})' * bool(entries)
      for entries, kind in zip(found, kinds, strict=True)
    ]
    message = f'{path} does not fit {arch}: {", ".join(parts)}'
    # A depth is named only where the whole file fits it.
    blocks = layout.matches(tensors, _CONV1) // (3 * len(layout.leaves))
    other = f'resnet{6 * blocks + 2}'
    if other in registry.names() and not any(
      _differences(layout, _layers(other, **options), tensors)
    ):
      message += f'; the file holds a {other}; set config.teacher.arch={other}'
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
