"""Builds networks of torchvision, timm and pytorchcv by name, from weights."""

import functools
import importlib
import os
from typing import Any

from clusterq_jax.errors import InputError
from clusterq_jax.weights import files
from clusterq_jax.weights.entries import join_names, shared_prefix

# Source of a name: the module that builds its networks.
SOURCES = {
  'torchvision': 'torchvision.models',
  'timm': 'timm',
  'pytorchcv': 'pytorchcv.model_provider',
}


def build(name: str, path: str | os.PathLike[str], entry: str = '') -> Any:
  """Builds a network and loads its weights.

  Args:
    name: source and name, such as 'timm:regnety_004'.
    path: a file with a state dict, such as torch.save writes.
    entry: name of the dictionary in the file; '' for the largest.

  Returns:
    The torch.nn.Module in eval mode.

  Raises:
    InputError: the source is not installed, has no such network, or the
      weights do not fit.
  """
  source, _, model = name.partition(':')
  if source not in SOURCES or not model:
    known = ', '.join(f'{source}:NAME' for source in SOURCES)
    raise InputError(f'--arch={name}: expected one of {known}')
  torch = import_library('torch', name)
  models = import_library(SOURCES[source], name)
  state = {
    key: torch.as_tensor(value) for key, value in _state(path, entry).items()
  }
  try:
    network = _make(models, source, model, state)
  except Exception as error:  # each source has its own kinds
    reason = ' '.join(str(error).split())[:200]
    raise InputError(f'--arch={name}: {source} refuses it: {reason}') from error
  try:
    network.load_state_dict(state)
  except RuntimeError as error:
    reason = ' '.join(str(error).split())[:300]
    raise InputError(f'{path}: does not fit {name}: {reason}') from error
  return network.eval()


def expected_input(name: str, network: Any) -> dict[str, Any]:
  """Returns what a source knows about the input of a network.

  Args:
    name: see `build`.
    network: the result of `build`.

  Returns:
    image_size, mean, std and crop, as far as they are known.
  """
  source, _, model = name.partition(':')
  if source == 'timm':
    known = network.pretrained_cfg
    return {
      'image_size': tuple(known['input_size'][1:]),
      'mean': tuple(known['mean']),
      'std': tuple(known['std']),
      'crop': known.get('crop_pct'),
    }
  if source == 'torchvision':
    models = importlib.import_module('torchvision.models')
    known = models.get_model_weights(model).DEFAULT.transforms()
    if not hasattr(known, 'crop_size'):
      raise InputError(f'--arch={name}: expected a classifier of images')
    (side,), (resized,) = known.crop_size, known.resize_size
    return {
      'image_size': (side, side),
      'mean': tuple(known.mean),
      'std': tuple(known.std),
      'crop': side / resized,
    }
  return {'image_size': tuple(network.in_size)}


def import_library(module: str, name: str) -> Any:
  """Imports a library, also one with a torchvision built for another torch.

  Args:
    module: name of the module.
    name: value of `--arch`, for messages.

  Raises:
    InputError: it cannot be imported.
  """
  try:
    try:
      return importlib.import_module(module)
    except RuntimeError as error:
      if 'torchvision::nms' not in str(error):
        raise
      _define_detection()
      return importlib.import_module(module)
  except Exception as error:  # compiled parts that do not fit raise any kind
    reason = ' '.join(str(error).split())[:200]
    raise InputError(
      f'--arch={name}: needs {module.partition(".")[0]}, which cannot be '
      f'imported ({reason}): '
      'pip install torch torchvision timm pytorchcv, in one command'
    ) from error


@functools.cache
def _define_detection() -> Any:
  """Declares two operators of torchvision that no classifier calls.

  A torchvision that was built for another torch lacks them, and then cannot be
  imported.
  """
  library = importlib.import_module('torch').library.Library
  operators = library('torchvision', 'DEF')
  for name in ('nms', 'qnms'):
    operators.define(
      f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    )
  return operators  # cached: they go when this object does


def _state(path: str | os.PathLike[str], entry: str) -> dict[str, Any]:
  """Reads the tensors of a file under their keys in the network."""
  entries, _ = files.read_entries(path)
  found = [each for each in entries if not entry or each.name == entry]
  if not found:
    names = join_names(repr(each.name) for each in entries)
    raise InputError(f'--entry={entry}: {path} has the entries {names}')
  state = dict(max(found, key=lambda each: len(each.values)).values)
  while prefix := shared_prefix(state):
    if prefix not in ('module.', '_orig_mod.'):
      break
    state = {key.removeprefix(prefix): value for key, value in state.items()}
  return state


def _make(models: Any, source: str, model: str, state: dict[str, Any]) -> Any:
  """Makes a network with as many classes as the weights have."""
  options: dict[str, Any] = {'pretrained': False}
  make = models.create_model if source == 'timm' else models.get_model
  if source == 'torchvision':
    options = {'weights': None}
    if model in ('googlenet', 'inception_v3'):
      # As torchvision does for the weights that it publishes.
      options |= {
        'init_weights': False,
        'aux_logits': any('aux' in key.lower() for key in state),
        'transform_input': True,
      }
  network = make(model, **options)
  # The keys of a file can have any order; in a network the classifier is last.
  last = [k for k, value in network.state_dict().items() if value.ndim][-1]
  classes = state[last].shape[:1] if last in state else ()
  if not classes or classes == network.state_dict()[last].shape[:1]:
    return network
  return make(model, num_classes=classes[0], **options)
