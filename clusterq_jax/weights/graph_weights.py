"""Writes and reads teacher files that carry their network's graph."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.models import graph_file
from clusterq_jax.models.graph import Graph
from clusterq_jax.weights import checks, files
from clusterq_jax.weights.entries import join_names

FORMAT = 'clusterq-jax teacher 2'
# Image size for checking a network that takes any size, if the file has none.
_USUAL = (224, 224)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A teacher's weights and the information in their file.

  Attributes:
    graph: the network.
    variables: {'params', 'batch_stats'} -> layer -> leaf, float32; kernels
      [kh, kw, cin/groups, cout] or [cin, cout], the other leaves [cout].
    in_channels: channels of the input images.
    num_classes: length of the logits.
    metadata: strings in the file's header.
    layout: name of the source's layout.
    report: one paragraph for the log.
    notes: warnings that the user should read before relying on the weights.
  """

  graph: Graph
  variables: dict[str, dict[str, dict[str, np.ndarray]]]
  in_channels: int
  num_classes: int
  metadata: dict[str, str]
  layout: str
  report: str
  notes: tuple[str, ...] = ()


def save(
  path: str | os.PathLike[str],
  graph: Graph,
  variables: Mapping[str, Any],
  expected_input: Mapping[str, Any],
  class_names: tuple[str, ...] = (),
  **more: str,
) -> None:
  """Writes a teacher file with its graph.

  Args:
    path: file to write or to replace.
    graph: the network.
    variables: {'params', 'batch_stats'} of the float network.
    expected_input: known fields of `Preprocessing`, and `crop`; see
      `teacher.Teacher`.
    class_names: one name for each class, or ().
    **more: further strings for the header, such as the source.

  Raises:
    InputError: the file cannot be written.
  """
  metadata = {
    'format': FORMAT,
    'graph': graph_file.to_json(graph),
    **{
      name: value if isinstance(value, str) else json.dumps(value)
      for name, value in expected_input.items()
    },
    **more,
  }
  if class_names:
    metadata['class_names'] = json.dumps(class_names)
  files.write_safetensors(path, variables, metadata)


def load(
  path: str, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> Loaded:
  """Reads a teacher from the contents of its file.

  Args:
    path: path of the file, for messages.
    tensors: tensors of the file by key.
    metadata: strings in the file's header, with `graph`.

  Raises:
    InputError: the graph is damaged, tensors are missing, left over or of
      another shape, or their values cannot be used.
  """
  if metadata.get('format') != FORMAT:
    raise InputError(
      f'{path}: metadata format is {metadata.get("format")!r}, expected '
      f'{FORMAT!r}'
    )
  try:
    graph = graph_file.from_json(metadata['graph'])
    variables = files.unflatten(tensors)
    channels = _in_channels(graph, variables)
    _check(graph, tensors, metadata, channels)
  except InputError as e:
    raise InputError(f'{path}: {e}') from e
  checks.check_channels(path, channels)
  num_classes = len(variables['params'][graph.nodes[-1].name]['bias'])
  checks.check_classes(path, num_classes)
  statistics = variables['batch_stats']
  count = sum(tensors[key].size for key in tensors if key[0] == 'p')
  return Loaded(
    graph,
    variables,
    channels,
    num_classes,
    metadata,
    'clusterq-jax',
    f'{path}: a network of {len(graph.nodes)} layers, {num_classes} classes, '
    f'{count:,} parameters, {len(statistics)} BatchNorm layers.',
    checks.untrained(path, statistics),
  )


def _in_channels(graph: Graph, variables: Mapping[str, Any]) -> int:
  """Returns the channels of the images."""
  if graph.image_shape is not None:
    return graph.image_shape[2]
  for node in graph.readers(graph.nodes[0].name):
    if node.op in ('conv_bn', 'conv'):
      kernel: Any = variables
      for key in ('params', node.name, 'kernel'):
        kernel = kernel.get(key) if isinstance(kernel, Mapping) else None
      if isinstance(kernel, np.ndarray) and kernel.ndim == 4:
        return kernel.shape[2] * node.groups
  raise InputError('graph: no image_shape, and no convolution of the input')


def _check(
  graph: Graph,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str],
  channels: int,
) -> None:
  """Refuses tensors that the graph does not need, or that cannot be used."""
  shape = graph.image_shape
  if shape is None:
    shape = (*_image_size(metadata), channels)
    graph_file.check_shapes(graph, shape)
  expected = {
    f'{collection}/{layer}/{leaf}': wanted
    for collection, layers in graph.variable_shapes(shape).items()
    for layer, leaves in layers.items()
    for leaf, wanted in leaves.items()
  }
  for keys, what in (
    (expected.keys() - tensors.keys(), 'missing'),
    (tensors.keys() - expected.keys(), 'left over'),
  ):
    if keys:
      names = join_names(sorted(keys))
      raise InputError(f'{len(keys)} tensors {what}: {names}')
  for key, wanted in expected.items():
    value = tensors[key]
    if value.shape != wanted:
      raise InputError(
        f'{key} is {list(value.shape)}; the graph expects {list(wanted)}'
      )
    if value.dtype != np.float32 or not np.isfinite(value).all():
      raise InputError(f'{key}: expected finite floats')
    if key.endswith('/var') and (value < 0).any():
      raise InputError(f'{key} has negative variances, expected none')


def _image_size(metadata: Mapping[str, str]) -> tuple[int, int]:
  """Returns the image size in the header, or a usual one."""
  try:
    size = json.loads(metadata.get('image_size', 'null'))
  except (ValueError, RecursionError):
    return _USUAL
  if isinstance(size, list) and len(size) == 2:
    if all(type(n) is int and 0 < n < 2**15 for n in size):
      return size[0], size[1]
  return _USUAL
