"""The teacher: a float network, its weights, and what they expect as input."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from clusterq_jax import weights as weights_lib
from clusterq_jax.data import ASSETS, Preprocessing
from clusterq_jax.errors import InputError
from clusterq_jax.layers import float as float_layers
from clusterq_jax.layers import protocol
from clusterq_jax.models import registry

_ORDERS = ('rgb', 'bgr', 'grey')
_LARGEST = 2**15  # pixels of a side
EMBEDDED = 'embedded'
EMBEDDED_FILE = ASSETS / 'fashion_mnist_resnet20.safetensors'


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen float classifier.

  Attributes:
    build: makes the architecture from a layer set.
    graph: the architecture's wiring.
    variables: {'params', 'batch_stats'}, arrays.
    preprocessing: what the weights expect of their input.
    num_classes: K, read off the classifier.
    options: the architecture's fields, read off the weights.
    class_names: K names, or ().
    report: what the weights file held.
  """

  build: registry.Builder
  graph: protocol.Graph
  variables: dict[str, Any]
  preprocessing: Preprocessing
  num_classes: int
  options: dict[str, Any]
  class_names: tuple[str, ...]
  report: str


def load(
  arch: str,
  path: str,
  hint: str = '',
  num_classes: int | None = None,
  **preprocessing: Any,
) -> Teacher:
  """Loads a teacher.

  Args:
    arch: name of the architecture.
    path: weights file, or 'embedded'.
    hint: how to get the file, for the error when it is not there; '': as is
      usual for the architecture.
    num_classes: what the config expects; None takes what the file has.
    **preprocessing: fields of `Preprocessing`; None means that the file's
      metadata say it.

  Raises:
    InputError: no such file, unfit weights, or nothing says what they expect.
  """
  file = EMBEDDED_FILE if path == EMBEDDED else pathlib.Path(path)
  if not file.exists():
    hint = hint or registry.architecture(arch).source
    raise InputError(
      f'teacher.weights: no file {path}' + f'; {hint}' * bool(hint)
    )
  loaded = weights_lib.load(str(file), arch)
  options = {k: v for k, v in loaded.options.items() if k != 'in_channels'}
  classes = int(loaded.options['num_classes'])
  if num_classes is not None and num_classes != classes:
    raise InputError(
      f'{path}: the classifier has {classes} classes; '
      f'config.teacher.num_classes={num_classes}'
    )
  build = registry.builder(arch, **options)
  graph = protocol.trace(build)
  expected = _preprocessing(path, arch, loaded, preprocessing)
  _check_image_size(build, graph, loaded.variables, expected)
  return Teacher(
    build=build,
    graph=graph,
    variables=loaded.variables,
    preprocessing=expected,
    num_classes=classes,
    options=options,
    class_names=_class_names(path, loaded),
    report=loaded.report,
  )


def expected_input(
  arch: str, loaded: weights_lib.Loaded, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """What weights expect, by field of `Preprocessing`.

  What is given goes over what the file says, and that over what is usual for
  the architecture.

  Returns:
    The values, and the names of those that are only usual. A field that
    nothing says is missing.
  """
  values: dict[str, Any] = {}
  assumed = []
  usual = registry.architecture(arch).preprocessing
  for field in dataclasses.fields(Preprocessing):
    name = field.name
    if given.get(name) is not None:
      values[name] = given[name]
    elif name in loaded.metadata:
      raw = loaded.metadata[name]
      values[name] = raw if name == 'channel_order' else _json(raw)
    elif name in usual:
      values[name] = usual[name]
      assumed.append(name)
  return values, assumed


def _preprocessing(
  path: str, arch: str, loaded: weights_lib.Loaded, given: Mapping
) -> Preprocessing:
  values, _ = expected_input(arch, loaded, given)
  for field in dataclasses.fields(Preprocessing):
    if field.name not in values and field.default is dataclasses.MISSING:
      raise InputError(
        f'{path} does not say what input its weights expect: set '
        f'config.teacher.{field.name} (and image_size, mean, std, '
        'pixel_range, channel_order where they differ from the defaults)'
      )
  channels = int(loaded.options['in_channels'])
  for name in ('image_size', 'mean', 'std'):
    if not _are_numbers(values[name]):
      raise InputError(f'{path}: {name}={values[name]!r}: expected numbers')
    values[name] = tuple(values[name])
  result = Preprocessing(**values)
  if len(result.image_size) != 2 or not all(
    isinstance(n, int) and 0 < n < _LARGEST for n in result.image_size
  ):
    raise InputError(
      f'{path}: image_size={result.image_size}: expected height and width'
    )
  if not _are_numbers([result.pixel_range]) or result.pixel_range <= 0:
    raise InputError(
      f'{path}: pixel_range={result.pixel_range!r}: expected the value of '
      'white, 1 or 255'
    )
  if result.channel_order not in _ORDERS:
    raise InputError(
      f'{path}: channel_order={result.channel_order!r}: expected one of '
      f'{", ".join(_ORDERS)}'
    )
  if len(result.mean) != channels or len(result.std) != channels:
    raise InputError(
      f'teacher.mean and teacher.std have {len(result.mean)} and '
      f'{len(result.std)} values; {path} takes {channels} channels'
    )
  if not all(math.isfinite(s) and s > 0 for s in result.std):
    raise InputError(f'teacher.std={result.std}: expected positive numbers')
  return result


def _check_image_size(
  build: registry.Builder,
  graph: protocol.Graph,
  variables: Mapping[str, Any],
  preprocessing: Preprocessing,
) -> None:
  """A classifier behind a pool of windows takes images of one size only."""
  network = build(float_layers.layer_set())
  images = jax.ShapeDtypeStruct((1, *preprocessing.shape), np.float32)
  last = graph.weighted[-1]
  found = len(variables['params'][last]['kernel'])
  try:
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    given = shapes['params'][last]['kernel'].shape[0]
  except ZeroDivisionError:  # of an initialiser: no window fits
    given = 0
  if found != given:
    raise InputError(
      f'teacher.image_size={preprocessing.image_size}: gives {last} {given} '
      f'features; its weights take {found}'
    )


def _class_names(path: str, loaded: weights_lib.Loaded) -> tuple[str, ...]:
  found = _json(loaded.metadata.get('class_names', '[]'))
  if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
    raise InputError(f'{path}: class_names={found!r}: expected a list of names')
  return tuple(found)


def _are_numbers(values: Any) -> bool:
  return isinstance(values, (list, tuple)) and all(
    isinstance(n, (int, float))
    and not isinstance(n, bool)
    and abs(n) < float('inf')
    for n in values
  )


def _json(raw: str) -> Any:
  try:
    return json.loads(raw)
  except (ValueError, RecursionError) as e:
    raise InputError(f'unreadable metadata {raw[:100]!r}: {e}') from e
