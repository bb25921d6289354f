"""A teacher's weights out of a file, if they fit its architecture exactly.

What a file must hold is read off the architecture's own definition, given a few
facts found in the file (input channels, classes, kind of shortcut); whatever is
missing, left over or of another shape is reported in one line.

A checkpoint wraps its state dict in various ways, so the rule is: the weights
are the dictionary of tensors that fits the architecture exactly, with prefixes
that all its keys share removed.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.layers import float_layers
from clusterq_jax.models import protocol, registry
from clusterq_jax.weights import files, layouts

FORMAT = 'clusterq-jax teacher 1'
_CHANNELS = (1, 3)
# Entries that come first where several fit.
_USUAL = ('', 'state_dict', 'model')
# As timm, pytorchcv, torchvision and PyPI `efficientnet-pytorch` call it.
_SQUEEZE = re.compile(r'(^|\.)(_?se|_?se_\w+)\.|\.block\.\d+\.fc1\.')


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
    notes: what the user should know before relying on these weights.
  """

  variables: dict[str, dict[str, dict[str, np.ndarray]]]
  options: dict[str, Any]
  metadata: dict[str, str]
  layout: str
  report: str
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """An entry of the file, and what is removed from the front of its keys."""

  entry: files.Entry
  prefix: str
  layout: layouts.Layout
  keys: tuple[str, ...]

  @property
  def matches(self) -> int:
    return self.layout.matches(self.keys)


def load(path: str | os.PathLike[str], arch: str, entry: str = '') -> Loaded:
  """Reads the weights of one architecture and refuses all that does not fit.

  Args:
    path: a file that `files.read_entries` takes.
    arch: a name from `models.registry`.
    entry: the name of the dictionary in the file to read, 'model_ema'; '': the
      one that fits.

  Raises:
    InputError: an unknown architecture, an unreadable file, no such entry,
      tensors missing, left over or of another shape, no BatchNorm statistics, a
      negative variance, or a number of channels or classes that is not
      supported.
  """
  path = os.fspath(path)
  known = layouts.known(arch)
  entries, metadata = files.read_entries(path)
  chosen, others = _choose(path, arch, known, entries, metadata, entry)
  try:
    loaded = _load(path, arch, known, chosen, metadata)
  except InputError as e:
    found = _description(entries, chosen)
    raise InputError(f'{e}; {found}' if found else str(e)) from e
  report, notes = loaded.report, list(loaded.notes)
  if len(entries) > 1:
    left = [other.name for other in entries if other is not chosen.entry]
    report += (
      f' Taken is the entry {chosen.entry.name!r}; not taken: '
      f'{files.names(name or "tensors at the top level" for name in left)}.'
    )
  if others:
    notes.append(
      f'{path}: the weights are those of the entry {chosen.entry.name!r}; '
      f'{files.names(others)} would fit as well (config.teacher.entry, or '
      '--entry of clusterq_jax.convert, chooses).'
    )
  return dataclasses.replace(loaded, report=report, notes=tuple(notes))


def _choose(
  path: str,
  arch: str,
  known: tuple[layouts.Layout, ...],
  entries: list[files.Entry],
  metadata: Mapping[str, str],
  entry: str,
) -> tuple[_Candidate, list[str]]:
  """The entry to read, and the names of others that fit as well."""
  if entry:
    found = [e for e in entries if e.name == entry]
    if not found:
      raise InputError(
        f'{path}: no entry {entry!r} with tensors (config.teacher.entry, '
        f'--entry); found {files.names(e.name or "the file" for e in entries)}'
      )
    entries = found
  candidates = []
  for found_entry in entries:
    prefix, keys = '', list(found_entry.shapes)
    while keys:
      layout = max(known, key=lambda layout: layout.matches(keys))
      candidates.append(_Candidate(found_entry, prefix, layout, tuple(keys)))
      more = files.shared_prefix(keys)
      if not more:
        break
      prefix, keys = prefix + more, [key.removeprefix(more) for key in keys]
  if not candidates:
    raise InputError(f'{path}: holds no tensors but counters')
  fitting: dict[str, _Candidate] = {}
  for candidate in candidates:
    if candidate.matches and _fits(arch, candidate, metadata):
      fitting.setdefault(candidate.entry.name, candidate)
  if not fitting:
    return max(candidates, key=lambda c: (c.matches, len(c.keys))), []
  names = sorted(fitting, key=lambda name: name not in _USUAL)
  return fitting[names[0]], names[1:]


def _fits(
  arch: str, candidate: _Candidate, metadata: Mapping[str, str]
) -> bool:
  """Whether the shapes are those of the architecture; reads no numbers."""
  shapes = candidate.entry.shapes.values()
  tensors: Mapping[str, np.ndarray] = {
    key: np.broadcast_to(np.float32(0), shape)
    for key, shape in zip(candidate.keys, shapes, strict=True)
  }
  layout = candidate.layout
  if layout.conv_classifier:
    tensors = _as_dense(layout, tensors)
  in_channels, options = _options(arch, layout, tensors, metadata)
  layers = layers_of(registry.architecture(arch), in_channels, **options)
  return not any(_differences(layout, layers, tensors))


def _description(entries: list[files.Entry], chosen: _Candidate) -> str:
  """What a file that does not fit holds, where that may explain it."""
  parts = []
  if len(entries) > 1:
    parts.append(
      'the file holds '
      + ', '.join(
        f'{len(entry.values)} tensors '
        + (f'in the entry {entry.name!r}' if entry.name else 'at the top level')
        for entry in entries[:4]
      )
    )
  keys = chosen.entry.shapes
  if prefix := files.shared_prefix(keys):
    parts.append(f'all keys start with {files.names([prefix])}')
  return '; '.join(parts)


def _load(
  path: str,
  arch: str,
  known: tuple[layouts.Layout, ...],
  chosen: _Candidate,
  metadata: dict[str, str],
) -> Loaded:
  """The weights of one candidate, checked."""
  layout = chosen.layout
  _check_kind(path, chosen.keys)
  tensors: Mapping[str, np.ndarray] = {
    key.removeprefix(chosen.prefix): value
    for key, value in chosen.entry.read().items()
  }
  if 2 * layout.matches(tensors) < len(tensors):
    raise InputError(
      f'{path}: found tensors of no layout known for {arch} '
      f'({files.names(tensors, 3)}), '
      f'expected one of {", ".join(layout.name for layout in known)}; '
      f'{_supported()}'
    )
  if not layout.torch_order:
    _check_metadata(path, metadata, arch)
  if layout.conv_classifier:
    tensors = _as_dense(layout, tensors)
  in_channels, options = _options(arch, layout, tensors, metadata)
  layers = layers_of(registry.architecture(arch), in_channels, **options)
  if layout.torch_order:
    _check_order(path, layout, layers, tensors)
  _check(path, arch, layout, in_channels, options, tensors)
  _check_supported(path, in_channels, options['num_classes'])
  variables: dict[str, dict[str, dict[str, np.ndarray]]] = {
    'params': {},
    'batch_stats': {},
  }
  for layer in layers:
    for leaf in layer.shapes:
      value = layout.to_flax(tensors[layout.key(layer, leaf)])
      group = variables[layouts.COLLECTIONS[leaf]]
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
    _untrained(path, variables['batch_stats']),
  )


def _check_supported(
  path: str, channels: int | None, classes: int | None
) -> None:
  """The one place that decides which inputs and outputs are supported."""
  if channels not in _CHANNELS:
    raise InputError(
      f'{path}: the weights take {channels} input channels; supported are '
      'images of 1 (grey) or 3 (colour)'
    )
  if classes is None or classes < 2:
    raise InputError(
      f'{path}: the classifier has {classes} class; expected 2 or more'
    )


def _untrained(
  path: str, statistics: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[str, ...]:
  """A note on BatchNorms whose statistics are those they began with."""
  fresh = [
    name
    for name, layer in statistics.items()
    if not layer['mean'].any() and (layer['var'] == 1).all()
  ]
  if not fresh:
    return ()
  return (
    f'WARNING: {path}: {len(fresh)} of {len(statistics)} BatchNorm layers have '
    f'mean 0 and variance 1 throughout ({files.names(fresh, 3)}), as before '
    'any training. The method matches these statistics, so that it cannot work '
    'without trained ones.',
  )


@functools.cache
def layers_of(
  architecture: registry.Architecture, in_channels: int | None, **options
) -> list[layouts.Layer]:
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
  layers: list[layouts.Layer] = []
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
    layers.append(layouts.Layer(name, shape, block))
  return layers


def _as_dense(
  layout: layouts.Layout, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  classifier = layouts.Layer(layouts.CLASSIFIER, (None,) * 2)
  kernel, bias = (layout.key(classifier, leaf) for leaf in ('kernel', 'bias'))
  tensors = dict(tensors)
  found = tensors.get(kernel)
  if found is not None and found.shape[2:] == (1, 1) and bias not in tensors:
    tensors[kernel] = found[:, :, 0, 0]
    tensors[bias] = np.zeros(len(found), np.float32)
  return tensors


def _options(
  arch: str,
  layout: layouts.Layout,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str],
) -> tuple[int | None, dict[str, Any]]:
  """Input channels and fields of the architecture, as the file decides them.

  None where the deciding tensor is missing.
  """

  def dim(layer: layouts.Layer, axis: int) -> int | None:
    value = tensors.get(layout.key(layer, 'kernel'))
    if value is None or value.ndim != len(layer.kernel):
      return None
    return layout.in_flax_order(value).shape[axis]

  graph = protocol.trace(registry.builder(arch, num_classes=1))
  first, last = graph.weighted[0], graph.weighted[-1]
  options: dict[str, Any] = {
    'num_classes': dim(layouts.Layer(last, (None,) * 2), 1),
    **layout.options.get(arch, {}),
  }
  family = registry.architecture(arch).family
  if family == 'cifar_resnet':
    shortcuts = [
      layouts.Layer(f'stage{s}_block1_shortcut', (None,) * 4) for s in (2, 3)
    ]
    conv = any(layout.key(layer, 'kernel') in tensors for layer in shortcuts)
    options['shortcut'] = 'conv' if conv else 'pad'
  if layout is layouts.OWN:  # what other sources decide, a converted file tells
    names = {
      name
      for other in layouts.known(arch)
      for name in other.options.get(arch, {})
    }
    options |= {name: True for name in names if metadata.get(name) == 'true'}
  return dim(layouts.Layer(first, (None,) * 4), 2), options


def _supported() -> str:
  return registry.HOW_TO_BRING_YOUR_OWN


def _check_kind(path: str, keys: Sequence[str]) -> None:
  """Refuses what no network here has, or lacks what each has."""
  if not any(re.search(r'(^|\.)running_mean$|/mean$', key) for key in keys):
    raise InputError(
      f'{path}: found no BatchNorm statistics (no running_mean among '
      f'{len(keys)} tensors): group or layer normalisation, or none; the '
      f'method needs a teacher with BatchNorm statistics; {_supported()}'
    )
  squeeze = [key for key in keys if _SQUEEZE.search(key)]
  if squeeze:
    raise InputError(
      f'{path}: squeeze-and-excitation ({files.names(squeeze, 1)}) is not '
      f'supported; {_supported()}'
    )


def _check_order(
  path: str,
  layout: layouts.Layout,
  layers: list[layouts.Layer],
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
  layout: layouts.Layout,
  layers: list[layouts.Layer],
  tensors: Mapping[str, np.ndarray],
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
  layout: layouts.Layout,
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
    layers = layers_of(registry.architecture(arch), in_channels, **found)
    return _differences(layout, layers, tensors)

  layers = layers_of(registry.architecture(arch), in_channels, **options)
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
