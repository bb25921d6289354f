"""Refuses weights that a network here cannot use, and names the fault."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.models import registry
from clusterq_jax.weights.entries import join_names
from clusterq_jax.weights.matching import Match

CHANNELS = (1, 3, 4)
# The names in timm, pytorchcv, torchvision and PyPI `efficientnet-pytorch`.
_SQUEEZE = re.compile(r'(^|\.)(_?se|_?se_\w+)\.|\.block\.\d+\.fc1\.')


def check_kind(path: str, keys: Sequence[str]) -> None:
  """Refuses networks without BatchNorm and with squeeze-and-excitation."""
  if not any(re.search(r'(^|\.)running_mean$|/mean$', key) for key in keys):
    raise InputError(
      f'{path}: found no BatchNorm statistics (no running_mean among '
      f'{len(keys)} tensors): group or layer normalisation, or none; the '
      'method needs a teacher with BatchNorm statistics; '
      f'{registry.HOW_TO_BRING_YOUR_OWN}'
    )
  squeeze = [key for key in keys if _SQUEEZE.search(key)]
  if squeeze:
    raise InputError(
      f'{path}: no network with a name has squeeze-and-excitation '
      f'({join_names(squeeze, 1)}); {registry.HOW_TO_BRING_YOUR_OWN}'
    )


def check_order(path: str, match: Match) -> None:
  """Refuses torch names with kernels in TensorFlow's order of axes."""
  layout, tensors = match.layout, match.tensors
  kernels = {}
  for layer in match.layers:
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


def check_fit(path: str, match: Match) -> None:
  """Refuses tensors that are missing, left over or of another shape.

  Raises:
    InputError: the message also names an architecture of the same family that
      the whole file fits, if there is one.
  """
  found = match.differences()
  if not any(found):
    return
  kinds = ('missing', 'unexpected', 'of another shape')
  parts = [
    f'{len(keys)} {kind}' + f' ({join_names(keys)})' * bool(keys)
    for keys, kind in zip(found, kinds, strict=True)
  ]
  advice = registry.HOW_TO_BRING_YOUR_OWN
  for other in registry.names(registry.architecture(match.arch).family):
    if not any(match.with_arch(other).differences()):
      advice = f'the file holds a {other}; set config.teacher.arch={other}'
      break
  raise InputError(
    f'{path} does not fit {match.arch}: {", ".join(parts)}; {advice}'
  )


def check_values(path: str, match: Match) -> None:
  """Refuses integers and negative variances; expects tensors that fit."""
  for layer in match.layers:
    for leaf in layer.shapes:
      key = match.layout.key(layer, leaf)
      value = match.tensors[key]
      if value.dtype != np.float32:
        raise InputError(f'{path}: {key} is {value.dtype}, expected a float')
      if leaf == 'var' and (value < 0).any():
        raise InputError(
          f'{path}: {key} has {(value < 0).sum()} negative variance(s) of '
          f'{value.size}, expected none'
        )


def check_channels(path: str, channels: int | None) -> None:
  """Refuses unsupported numbers of input channels."""
  if channels not in CHANNELS:
    raise InputError(
      f'{path}: the weights take {channels} input channels; expected 1 (grey '
      'images), 3 (colour images) or 4'
    )


def check_classes(path: str, classes: int | None) -> None:
  """Refuses a classifier with fewer than two classes."""
  if classes is None or classes < 2:
    raise InputError(
      f'{path}: the classifier has {classes} class; expected 2 or more'
    )


def untrained(
  path: str, statistics: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[str, ...]:
  """Returns a warning if BatchNorm statistics have their initial values.

  Args:
    path: path of the file.
    statistics: 'mean' and 'var', [C] each, by name of the layer.
  """
  fresh = [
    name
    for name, layer in statistics.items()
    if not layer['mean'].any() and (layer['var'] == 1).all()
  ]
  if not fresh:
    return ()
  return (
    f'WARNING: {path}: {len(fresh)} of {len(statistics)} BatchNorm layers have '
    f'mean 0 and variance 1 throughout ({join_names(fresh, 3)}), their values '
    'before training. The method matches these statistics and cannot work '
    'without trained ones.',
  )
