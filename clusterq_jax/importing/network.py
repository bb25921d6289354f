"""Imports a program: a graph, its variables, and what its input becomes."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.importing import (
  live,
  names,
  operators,
  passes,
  pt2_files,
  refusals,
)
from clusterq_jax.importing.layer import Layer
from clusterq_jax.importing.program import Program
from clusterq_jax.importing.translator import Translator
from clusterq_jax.models import graph_file
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.node import Node

_STATISTICS = ('mean', 'var')


@dataclasses.dataclass(frozen=True)
class Imported:
  """A network that was imported.

  Attributes:
    graph: the network; `image_shape` is that of the program's example.
    variables: {'params', 'batch_stats'} -> layer -> leaf, float32.
    factor: the graph's input is factor * the program's input + shift, [C].
    shift: see `factor`; other than 1 and 0 if the program itself begins with a
      normalisation (`transform_input` of Inception).
  """

  graph: Graph
  variables: dict[str, dict[str, dict[str, np.ndarray]]]
  factor: np.ndarray
  shift: np.ndarray

  def normalization(
    self, mean: Sequence[float], std: Sequence[float]
  ) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std of the graph's input.

    Args:
      mean: mean of each channel, as the program expects it, C values.
      std: standard deviation of each channel, C values.
    """
    deviations = np.asarray(std, np.float64) / self.factor
    means = np.asarray(mean, np.float64) - self.shift * deviations
    return tuple(means.tolist()), tuple(deviations.tolist())


def import_program(
  program: str | os.PathLike[str] | Program | Any, source: str = 'the network'
) -> Imported:
  """Imports a network.

  Args:
    program: path of a .pt2 file, or a torch.export.ExportedProgram.
    source: name of a program that is no file, for messages.

  Raises:
    InputError: a file that cannot be read, or a network that no graph can be.
  """
  if isinstance(program, (str, os.PathLike)):
    program = pt2_files.read(program)
  elif not isinstance(program, Program):
    program = live.read(program, source)
  layers = passes.run(
    Translator(program, operators.HANDLERS).run(), program.source
  )
  factor, shift = _take_normalization(layers)
  refusals.check_batch_norms(
    program, sum(layer.op == 'conv_bn' for layer in layers)
  )
  names.assign(layers)
  c, h, w = layers[0].shape
  graph = Graph(tuple(map(_node, layers)), (h, w, c))
  variables = _variables(program.source, layers)
  _check(program.source, graph, layers, variables)
  try:
    graph_file.from_json(graph_file.to_json(graph))
  except InputError as error:  # absurd sizes
    raise InputError(f'{program.source}: {error}') from error
  return Imported(graph, variables, factor, shift)


def _take_normalization(layers: list[Layer]) -> tuple[np.ndarray, np.ndarray]:
  """Takes an affine off the input, if positive; else makes it a layer."""
  image = layers[0]
  channels = image.shape[0]
  for layer in layers:
    if layer.op != 'affine':
      continue
    arrays = layer.arrays
    if (arrays['factor'] > 0).all() and not any(
      image in other.inputs for other in layers if other is not layer
    ):
      layers.remove(layer)
      for other in layers:
        other.inputs = [image if x is layer else x for x in other.inputs]
      return arrays['factor'], arrays['shift']
    passes.make_conv(layer)
  return np.ones(channels), np.zeros(channels)


def _node(layer: Layer) -> Node:
  options = dict(layer.options)
  return Node(
    layer.name, layer.op, tuple(x.name for x in layer.inputs), **options
  )


def _variables(source: str, layers: Sequence[Layer]) -> dict[str, Any]:
  variables: dict[str, Any] = {'params': {}, 'batch_stats': {}}
  for layer in layers:
    for leaf, values in layer.arrays.items():
      with np.errstate(over='ignore'):
        array = np.array(values, np.float32, order='C')
      if not np.isfinite(array).all():
        raise InputError(
          f'{source}: {leaf} of {layer.name} has NaN or infinite values, '
          'expected finite numbers'
        )
      kind = 'batch_stats' if leaf in _STATISTICS else 'params'
      variables[kind].setdefault(layer.name, {})[leaf] = array
  return variables


def _check(
  source: str, graph: Graph, layers: Sequence[Layer], variables: dict
) -> None:
  """Compares the graph's own shapes with those of the program."""
  shapes = graph.shapes()
  for layer in layers:
    c, h, w = layer.shape
    if shapes[layer.name] != (h, w, c):
      raise AssertionError(
        f'{source}: {layer.where}: {layer.name} gives {shapes[layer.name]}, '
        f'the program says {(h, w, c)}'
      )
  wanted = graph.variable_shapes()
  found = {
    kind: {
      name: {leaf: array.shape for leaf, array in leaves.items()}
      for name, leaves in group.items()
    }
    for kind, group in variables.items()
  }
  assert found == wanted, source
