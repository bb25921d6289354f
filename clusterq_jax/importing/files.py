"""Writes an imported network as a teacher's file."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from clusterq_jax import weights as weights_lib
from clusterq_jax.errors import InputError
from clusterq_jax.importing.network import Imported
from clusterq_jax.weights import teacher
from clusterq_jax.weights.checks import untrained


def check_output(
  output: str | os.PathLike[str], given_as: str = ''
) -> pathlib.Path:
  """Refuses an output that exists or is no .safetensors file.

  Args:
    output: path of the file to write.
    given_as: prefix of the name `output` in messages.
  """
  path = pathlib.Path(output)
  if path.suffix != '.safetensors':
    raise InputError(
      f'{given_as}output={path}: expected a name in .safetensors'
    )
  if path.exists():
    raise InputError(
      f'{given_as}output={path}: exists; remove it, or name another'
    )
  return path


def write(
  imported: Imported,
  output: str | os.PathLike[str],
  *,
  mean: Sequence[float],
  std: Sequence[float],
  pixel_range: float | None = None,
  channel_order: str | None = None,
  crop: float | None = None,
  class_names: Sequence[str] = (),
  given_as: str = '',
) -> str:
  """Writes a network with all that a run needs to know about it.

  Args:
    imported: the network.
    output: path of the new file, .safetensors.
    mean: mean of each channel of the program's input.
    std: standard deviation of each channel of the program's input.
    pixel_range: value of white before mean and std: 1, the default, or 255.
    channel_order: 'rgb', 'bgr' or 'grey'; by default the number of channels
      decides.
    crop: side of the centre crop in evaluation, as a fraction of the resized
      image's shorter side.
    class_names: one name for each class, or none.
    given_as: prefix of an argument's name in messages.

  Returns:
    A report of what was written.

  Raises:
    InputError: the output exists, or an impossible value.
  """
  path = check_output(output, given_as)
  graph, variables = imported.graph, imported.variables
  assert graph.image_shape is not None
  h, w, channels = graph.image_shape
  classes = graph.nodes[-1].features
  if class_names and len(class_names) != classes:
    raise InputError(
      f'{given_as}class_names: {len(class_names)} names; the network has '
      f'{classes} classes'
    )
  values: dict[str, Any] = {
    'image_size': (h, w),
    'mean': tuple(mean),
    'std': tuple(std),
    'pixel_range': 1.0 if pixel_range is None else pixel_range,
    'channel_order': channel_order or ('grey' if channels == 1 else 'rgb'),
  }
  origins = {name: f'{given_as}{name}' for name in values}
  teacher.check_input(values, origins, channels)
  values['mean'], values['std'] = imported.normalization(mean, std)
  own = ' after the normalisation that the network begins with'
  origins = {name: f'{origin}{own}' for name, origin in origins.items()}
  teacher.check_input(values, origins, channels)
  if crop is not None:
    values['crop'] = crop
  path.parent.mkdir(parents=True, exist_ok=True)
  weights_lib.save(path, graph, variables, values, tuple(class_names))
  arrays = [
    a for leaves in variables['params'].values() for a in leaves.values()
  ]
  statistics = variables['batch_stats']
  report = [
    f'imported {len(graph.nodes)} layers for images of {h}x{w}x{channels}, '
    f'{classes} classes; {sum(a.size for a in arrays):,} parameters, '
    f'{len(statistics)} BatchNorm layers with '
    f'{sum(s["mean"].size for s in statistics.values()):,} channels',
    *untrained(str(path), statistics),
    f'{path}: {path.stat().st_size / 1e6:.2f} MB',
  ]
  return '\n'.join(report)
