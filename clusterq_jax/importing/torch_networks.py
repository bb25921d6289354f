"""Imports a live network of torch and checks it against torch itself."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.importing import files
from clusterq_jax.importing.network import Imported, import_program
from clusterq_jax.layers import float_layers
from clusterq_jax.models import network as network_lib

_IMAGES = 4
# Float32 alone explains less; more hints at a defect.
SOUND = 1e-4


def import_live(
  network: Any, shape: tuple[int, int, int], name: str
) -> Imported:
  """Exports a network for images of one size and imports it.

  Args:
    network: a torch.nn.Module in eval mode.
    shape: (H, W, C) of its images.
    name: name of the network, for messages.

  Raises:
    InputError: torch cannot export it, or no graph can be it.
  """
  import torch

  h, w, c = shape
  try:
    exported = torch.export.export(network, (torch.zeros(2, c, h, w),))
  except Exception as error:  # torch raises whatever the network's code does
    reason = ' '.join(str(error).split())[:300]
    raise InputError(
      f'{name}: torch.export.export fails for images [2, {c}, {h}, {w}]: '
      f'{reason}'
    ) from error
  return import_program(exported, name)


def parity(network: Any, imported: Imported, images: int = _IMAGES) -> float:
  """Compares an imported network with torch on random images.

  Args:
    network: the torch.nn.Module in eval mode.
    imported: what was imported of it.
    images: number of images.

  Returns:
    The largest difference of a logit, over the largest logit; both in float32.
  """
  import torch

  assert imported.graph.image_shape is not None
  x = np.random.default_rng(0).standard_normal(
    (images, *imported.graph.image_shape), np.float32
  )
  with torch.no_grad():
    expected = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
  return difference(logits(imported, x), only_tensor(expected).numpy())


def only_tensor(result: Any) -> Any:
  """Returns the tensor of a result, which may be a dictionary or tuple of it.

  Args:
    result: what a torch.nn.Module returned.

  Raises:
    ValueError: there are several tensors.
  """
  while not hasattr(result, 'numpy'):
    (result,) = result.values() if hasattr(result, 'values') else result
  return result


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
  """Returns the largest difference of a logit, over the largest logit.

  Args:
    found: logits, [B, K].
    wanted: the right ones, [B, K].
  """
  return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def logits(imported: Imported, x: np.ndarray) -> np.ndarray:
  """Computes the logits of an imported network.

  Args:
    imported: the network.
    x: input of the program that it was imported from, float32 [B, H, W, C].

  Returns:
    float32 [B, K].
  """
  build = network_lib.builder(imported.graph)
  apply = jax.jit(build(float_layers.layer_set()).apply)
  x = (x * imported.factor + imported.shift).astype(np.float32)
  return np.asarray(apply(imported.variables, x))


def from_torch(
  network: Any,
  image_size: Sequence[int],
  mean: Sequence[float],
  std: Sequence[float],
  output: str | os.PathLike[str],
  **details: Any,
) -> float:
  """Imports a network of torch, writes its file and checks it against torch.

  Prints what was imported and how far its logits are from torch's.

  Args:
    network: a torch.nn.Module that classifies images; any class.
    image_size: (H, W) in pixels.
    mean: mean of each input channel; 1, 3 or 4 values.
    std: standard deviation of each input channel.
    output: path of the new file, .safetensors.
    **details: other arguments of `files.write`: pixel_range, channel_order,
      class_names.

  Returns:
    The largest difference of a logit, over the largest logit, see `parity`.

  Raises:
    InputError: the network cannot be imported, or the output exists.
  """
  files.check_output(output)
  name = type(network).__name__
  size = tuple(image_size) if isinstance(image_size, Sequence) else ()
  if len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
    raise InputError(f'image_size={image_size}: expected height and width')
  if network.training:
    raise InputError(
      f'{name}: the network is in train mode; call network.eval() first'
    )
  imported = import_live(network, (size[0], size[1], len(mean)), name)
  found = parity(network, imported)
  print(files.write(imported, output, mean=mean, std=std, **details))
  print(describe(found))
  return found


def describe(found: float) -> str:
  """Describes the result of `parity` in one line."""
  text = (
    f'parity with torch on {_IMAGES} random images: the largest difference of '
    f'a logit is {found:.1e} of the largest logit'
  )
  if not found <= SOUND:  # also if it is NaN
    text = (
      f'WARNING: {text}, expected at most {SOUND:.0e}: the network is '
      'ill-conditioned in float32, or was imported wrongly'
    )
  return text
