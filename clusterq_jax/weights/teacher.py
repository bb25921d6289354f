"""The teacher: a float network, its weights and the input they expect."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from clusterq_jax import weights as weights_lib
from clusterq_jax.data.assets import ASSETS
from clusterq_jax.errors import InputError
from clusterq_jax.models import network, registry
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.preprocessing import Preprocessing

_ORDERS = ('rgb', 'bgr', 'grey')
_LARGEST = 2**15  # largest side of an image in pixels, exclusive
EMBEDDED = 'embedded'
EMBEDDED_FILE = ASSETS / 'fashion_mnist_resnet20.safetensors'


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen float classifier.

  Attributes:
    build: makes the network from a layer set.
    graph: wiring of the network.
    variables: {'params', 'batch_stats'} -> layer -> leaf, float32.
    preprocessing: the input that the weights expect.
    num_classes: K, read off the classifier.
    crop: side of the centre crop in evaluation, as a fraction of the resized
      image's shorter side.
    class_names: K names, or ().
    notes: warnings that the user should read before relying on the weights.
  """

  build: registry.Builder
  graph: Graph
  variables: dict[str, Any]
  preprocessing: Preprocessing
  num_classes: int
  crop: float
  class_names: tuple[str, ...]
  notes: tuple[str, ...]

  @property
  def resize(self) -> int:
    """Returns the shorter side to resize to before the centre crop."""
    return round(min(self.preprocessing.image_size) / self.crop)


def load(
  arch: str,
  path: str,
  entry: str = '',
  num_classes: int | None = None,
  **preprocessing: Any,
) -> Teacher:
  """Loads a teacher.

  Args:
    arch: name of the architecture.
    path: path of the weights file, or 'embedded'.
    entry: entry of the file, see `weights.load`.
    num_classes: number of classes that the config expects; None for any.
    **preprocessing: fields of `Preprocessing`; None takes the value in the
      file's metadata, or else the usual one.

  Raises:
    InputError: no such file, weights that do not fit, or an input format that
      is unknown.
  """
  file = EMBEDDED_FILE if path == EMBEDDED else pathlib.Path(path)
  if not file.exists():
    advice = '; ' + registry.architecture(arch).source if arch else ''
    raise InputError(f'teacher.weights: no file {path}{advice}')
  loaded = weights_lib.load(str(file), arch, entry)
  classes = loaded.num_classes
  if num_classes is not None and num_classes != classes:
    raise InputError(
      f'{path}: the classifier has {classes} classes; '
      f'config.teacher.num_classes={num_classes}'
    )
  expected = _preprocessing(path, arch, loaded, preprocessing)
  _check_image_size(loaded, expected)
  return Teacher(
    build=network.builder(loaded.graph),
    graph=loaded.graph,
    variables=loaded.variables,
    preprocessing=expected,
    num_classes=classes,
    crop=_crop(path, arch, loaded),
    class_names=_class_names(path, loaded),
    notes=loaded.notes,
  )


def _usual(
  arch: str, loaded: weights_lib.Loaded
) -> registry.Architecture | None:
  """Returns the named architecture of weights, or None."""
  arch = loaded.metadata.get('arch', arch)
  return registry.architecture(arch) if arch in registry.names() else None


def _crop(path: str, arch: str, loaded: weights_lib.Loaded) -> float:
  """Returns the crop in the file's metadata, or the architecture's."""
  if 'crop' not in loaded.metadata:
    usual = _usual(arch, loaded)
    return usual.crop if usual else 1.0
  found = _json(path, 'crop', loaded.metadata['crop'])
  if not _are_numbers([found]) or not 0.1 <= found <= 1:
    raise InputError(f'{path}: crop={found!r}: expected a share from 0.1 to 1')
  return float(found)


class ExpectedInput(NamedTuple):
  """The input that weights expect.

  Attributes:
    values: checked values by field of `Preprocessing`, without unknown fields.
    assumed: fields whose values are the usual ones for the architecture.
  """

  values: dict[str, Any]
  assumed: list[str]


def expected_input(
  path: str,
  arch: str,
  loaded: weights_lib.Loaded,
  given: Mapping[str, Any],
  given_as: str = 'config.teacher.',
) -> ExpectedInput:
  """Collects the input that weights expect.

  A value comes from the user, else from the file's metadata, else it is the
  usual one for the architecture.

  Args:
    path: path of the weights.
    arch: name of the architecture.
    loaded: the weights.
    given: the user's values by field of `Preprocessing`; None is not given.
    given_as: prefix of a field's name where the user gave it, for messages.

  Raises:
    InputError: an impossible value; the message names its origin.
  """
  values: dict[str, Any] = {}
  origins: dict[str, str] = {}
  assumed = []
  architecture = _usual(arch, loaded)
  usual = dict(architecture.preprocessing) if architecture else {}
  if loaded.graph.image_shape is not None:
    usual['image_size'] = loaded.graph.image_shape[:2]
  for name in (field.name for field in dataclasses.fields(Preprocessing)):
    origins[name] = f'{path}: {name}'
    if given.get(name) is not None:
      values[name] = given[name]
      origins[name] = f'{given_as}{name}'
    elif name in loaded.metadata:
      raw = loaded.metadata[name]
      values[name] = raw if name == 'channel_order' else _json(path, name, raw)
    elif name in usual:
      values[name] = usual[name]
      assumed.append(name)
  check_input(values, origins, loaded.in_channels)
  return ExpectedInput(values, assumed)


def check_input(
  values: dict[str, Any], origins: Mapping[str, str], channels: int
) -> None:
  """Refuses impossible values; turns lists in `values` into tuples.

  Args:
    values: values by field of `Preprocessing`; fields may be absent.
    origins: what to call each value in a message.
    channels: number of channels of the network's input.

  Raises:
    InputError: an impossible value.
  """

  def refuse(name: str, expected: str) -> NoReturn:
    raise InputError(f'{origins[name]}={values[name]!r}: expected {expected}')

  white = values.get('pixel_range', 1.0)
  if not _are_numbers([white]) or not white > 0:
    refuse('pixel_range', 'the value of white, 1 or 255')
  if values.get('channel_order', 'rgb') not in _ORDERS:
    refuse('channel_order', f'one of {", ".join(_ORDERS)}')
  if 'image_size' in values:
    size = values['image_size']
    if not (
      _are_numbers(size)
      and len(size) == 2
      and all(isinstance(n, int) and 0 < n < _LARGEST for n in size)
    ):
      refuse('image_size', 'height and width')
    values['image_size'] = tuple(size)
  for name in ('mean', 'std'):
    if name not in values:
      continue
    if not _are_numbers(values[name]) or len(values[name]) != channels:
      refuse(
        name, f'{channels} number(s), one for each input channel of the weights'
      )
    values[name] = tuple(values[name])
    if name == 'std' and not all(value > 0 for value in values[name]):
      refuse(name, 'positive numbers')
    if name == 'mean' and not all(0 <= m <= white for m in values[name]):
      refuse(
        name,
        f'numbers from 0 to {white:g}, which is pixel_range, the value of a '
        'white pixel before mean and std',
      )


def _preprocessing(
  path: str, arch: str, loaded: weights_lib.Loaded, given: Mapping
) -> Preprocessing:
  """Returns the input that weights expect, and refuses to guess it."""
  values, _ = expected_input(path, arch, loaded, given)
  for field in dataclasses.fields(Preprocessing):
    if field.name not in values and field.default is dataclasses.MISSING:
      raise InputError(
        f'{path} does not tell what input its weights expect: set '
        f'config.teacher.{field.name} (and image_size, mean, std, '
        'pixel_range, channel_order where they differ from the defaults)'
      )
  return Preprocessing(**values)


def _check_image_size(
  loaded: weights_lib.Loaded, preprocessing: Preprocessing
) -> None:
  """Refuses an image size that the network does not take."""
  graph, frozen = loaded.graph, loaded.graph.image_shape
  size = preprocessing.image_size
  if frozen is not None and frozen[:2] != size:
    raise InputError(
      f'teacher.image_size={size}: the network was exported for {frozen[:2]}; '
      'export it again at another size'
    )
  last = graph.nodes[-1].name
  found = len(loaded.variables['params'][last]['kernel'])
  try:
    shapes = graph.variable_shapes(preprocessing.shape)
    given = shapes['params'][last]['kernel'][0]
  except ValueError:  # no window fits
    given = 0
  if found != given:
    raise InputError(
      f'teacher.image_size={size}: gives {last} {given} features; its weights '
      f'take {found}'
    )


def _class_names(path: str, loaded: weights_lib.Loaded) -> tuple[str, ...]:
  """Returns the class names in the file's metadata, or ()."""
  found = _json(path, 'class_names', loaded.metadata.get('class_names', '[]'))
  if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
    raise InputError(f'{path}: class_names={found!r}: expected a list of names')
  if found and len(found) != loaded.num_classes:
    raise InputError(
      f'{path}: class_names has {len(found)} names; the classifier has '
      f'{loaded.num_classes} classes'
    )
  return tuple(found)


def _are_numbers(values: Any) -> bool:
  """Tells whether `values` is a list or tuple of finite numbers."""
  return isinstance(values, (list, tuple)) and all(
    isinstance(n, (int, float))
    and not isinstance(n, bool)
    and abs(n) < float('inf')
    for n in values
  )


def _json(path: str, key: str, raw: str) -> Any:
  """Decodes one metadata string."""
  try:
    return json.loads(raw)
  except (ValueError, RecursionError) as e:
    raise InputError(
      f'{path}: metadata {key} is {raw[:100]!r}: expected JSON ({e})'
    ) from e
