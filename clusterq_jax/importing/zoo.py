"""Builds networks of torchvision, timm and pytorchcv by name, from weights."""

import importlib
import os
from typing import Any

from clusterq_jax.errors import InputError

SOURCES = ('torchvision', 'timm', 'pytorchcv')


def build(name: str, path: str | os.PathLike[str]) -> Any:
  """Builds a network and loads its weights.

  Args:
    name: source and name, such as 'timm:regnety_004'.
    path: a state dict that torch.save wrote.

  Returns:
    The torch.nn.Module in eval mode.

  Raises:
    InputError: the source is not installed, has no such network, or the
      weights do not fit.
  """
  source, _, model = name.partition(':')
  if source not in SOURCES:
    known = ', '.join(f'{source}:NAME' for source in SOURCES)
    raise InputError(f'--arch={name}: expected one of {known}')
  torch = _import('torch', name)
  _import(source, name)
  state = _state(torch, path)
  try:
    network = _make(source, model, state)
  except Exception as error:  # each source has its own kinds
    reason = ' '.join(str(error).split())[:200]
    raise InputError(f'--arch={name}: {source} refuses it: {reason}') from error
  try:
    network.load_state_dict(state)
  except RuntimeError as error:
    reason = ' '.join(str(error).split())[:300]
    raise InputError(f'{path}: does not fit {name}: {reason}') from error
  return network.eval()


def expected_input(network: Any) -> dict[str, Any]:
  """Returns what a network of timm says about its input.

  Returns:
    image_size, mean, std and crop; empty for networks of other sources.
  """
  known = getattr(network, 'pretrained_cfg', None)
  if not isinstance(known, dict) or not known.get('input_size'):
    return {}
  return {
    'image_size': tuple(known['input_size'][1:]),
    'mean': tuple(known['mean']),
    'std': tuple(known['std']),
    'crop': known.get('crop_pct'),
  }


def _import(module: str, name: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise InputError(
      f'--arch={name}: needs {module}, which is not installed ({error}): pip '
      f'install {module}'
    ) from error


def _state(torch: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a state dict, which may stand under a usual key."""
  try:
    with open(path, 'rb') as file:
      state = torch.load(file, map_location='cpu', weights_only=True)
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from error
  except Exception as error:  # damaged contents raise nearly every kind
    reason = ' '.join(str(error).split())[:200]
    raise InputError(f'{path}: cannot be read as a state dict: {reason}') from (
      error
    )
  for key in ('state_dict', 'model', 'state_dict_ema', 'model_ema'):
    if isinstance(state, dict) and isinstance(state.get(key), dict):
      state = state[key]
  if not isinstance(state, dict) or not state:
    raise InputError(f'{path}: expected a state dict')
  return {str(k).removeprefix('module.'): v for k, v in state.items()}


def _make(source: str, model: str, state: dict[str, Any]) -> Any:
  """Makes a network with as many classes as the weights have."""
  *_, last = (v for v in state.values() if getattr(v, 'ndim', 0) >= 1)
  classes = len(last)
  if source == 'torchvision':
    models = importlib.import_module('torchvision.models')
    # Only these two know the option, and without it they warn for minutes.
    options = {}
    if model in ('googlenet', 'inception_v3'):
      options = {
        'init_weights': False,
        'aux_logits': any('Aux' in k or 'aux' in k for k in state),
        'transform_input': False,
      }
    return models.get_model(model, weights=None, num_classes=classes, **options)
  if source == 'timm':
    timm = importlib.import_module('timm')
    return timm.create_model(model, pretrained=False, num_classes=classes)
  provider = importlib.import_module('pytorchcv.model_provider')
  return provider.get_model(model, pretrained=False, num_classes=classes)
