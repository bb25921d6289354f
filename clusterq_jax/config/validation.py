"""Turns the config that a user sets into the values that a run uses."""

import dataclasses
import json
import math
import textwrap
import typing
from typing import Any

import ml_collections
from flax import traverse_util

from clusterq_jax.config import derive, fields, presets
from clusterq_jax.config.fields import Config
from clusterq_jax.config.meaning import Meaning
from clusterq_jax.errors import InputError
from clusterq_jax.models import registry

# Version of config.json. Files of other versions hold other fields.
SCHEMA = 2
# Sections and fields that may differ between runs of one workdir.
FREE = ('dryrun', 'eval', 'export', 'report', 'steps_per_call')
# Default of quant.headroom by activation bits; more bits allow wider ranges.
_HEADROOM = {2: 0.0, 3: 0.1}
_MOST_HEADROOM = 0.2

_MEANINGS = fields.meanings()
_WRAPPER = textwrap.TextWrapper(
  width=80, initial_indent='    ', subsequent_indent='    '
)


def flatten(config: ml_collections.ConfigDict | Config) -> dict[str, Any]:
  """Returns the values of all fields, by dotted name."""
  if isinstance(config, Config):
    tree = dataclasses.asdict(config)
  else:
    tree = config.to_dict()
  return traverse_util.flatten_dict(tree, sep='.')


def resolve(config: ml_collections.ConfigDict) -> Config:
  """Checks a config and fills in the values that follow from other fields.

  Values that follow from the network stay None; `complete` fills them in.

  Args:
    config: a changed `presets.default_config()`.

  Raises:
    InputError: a field is unknown or missing, or its value is not accepted.
  """
  values = flatten(config)
  _check_names(values)
  for name in values:
    values[name] = _checked(name, values[name])
  if values['teacher.arch']:
    try:
      registry.architecture(values['teacher.arch'])
    except InputError as e:
      raise InputError(f'config.teacher.arch: {e}') from e
  return _filled_in(values)


def complete(
  config: Config, image_size: tuple[int, int], num_classes: int
) -> Config:
  """Fills in the values that follow from the network.

  Args:
    config: resolved config; values that it holds stay.
    image_size: (H, W) of the network's input, in pixels.
    num_classes: number of classes of the network.

  Raises:
    InputError: fields do not fit together.
  """
  values = flatten(config)
  for name, value in derive.values(image_size, num_classes).items():
    if values[name] is None:
      values[name] = value
  return _filled_in(values)


def _filled_in(values: dict[str, Any]) -> Config:
  """Returns the config of checked values and of those that follow from them."""
  _fill_in(values)
  _check_schedule(values)
  return _to_dataclass(Config, traverse_util.unflatten_dict(values, sep='.'))


def _to_dataclass(kind: Any, tree: dict[str, Any]) -> Any:
  hints = typing.get_type_hints(kind)
  return kind(
    **{
      name: _to_dataclass(hints[name], value)
      if dataclasses.is_dataclass(hints[name])
      else value
      for name, value in tree.items()
    }
  )


def _check_names(values: dict[str, Any]) -> None:
  for name in values.keys() ^ _MEANINGS.keys():
    problem = 'unknown' if name in values else 'missing'
    raise InputError(f'config.{name}: {problem} field')


def _types() -> dict[str, tuple[type, bool, bool]]:
  """Returns (type, whether None is accepted, whether integer) by field."""
  found = {}
  for outer in dataclasses.fields(Config):
    section: Any = outer.default
    inner = dataclasses.is_dataclass(section)
    for field in dataclasses.fields(section) if inner else [outer]:
      name = f'{outer.name}.{field.name}' if inner else outer.name
      whole = 'int' in str(field.type)
      optional = field.default is None or _MEANINGS[name].recipe is not None
      found[name] = presets.kind_of(field.type), optional, whole
  return found


_TYPES = _types()


def _is_number(value: Any) -> bool:
  """Tells whether a value is a finite float or a 32-bit integer."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  if isinstance(value, int):
    return -(2**31) <= value < 2**31
  return math.isfinite(value)


def _checked(name: str, value: Any) -> Any:
  """Checks the value of a field and returns it; lists become tuples."""
  kind, optional, whole = _TYPES[name]
  if value is None and optional:
    return None
  if kind is tuple and isinstance(value, list):
    value = tuple(value)

  def refuse(expected: str) -> typing.NoReturn:
    raise InputError(f'config.{name}={value!r}: expected {expected}')

  numbers = value if isinstance(value, tuple) else (value,)
  if kind is bool and not isinstance(value, bool):
    refuse('True or False')
  if kind is str and not (isinstance(value, str) and '\0' not in value):
    refuse('a string')
  if kind in (int, float, tuple):
    if not (isinstance(value, tuple) == (kind is tuple)) or not all(
      _is_number(n) and (isinstance(n, int) or not whole) for n in numbers
    ):
      what = '32-bit integer' if whole else 'finite number'
      article = 'an' if what[0] in 'aeiou' else 'a'
      refuse(f'{what}s' if kind is tuple else f'{article} {what}')
    _check_bounds(_MEANINGS[name], numbers, refuse)
  choices = _MEANINGS[name].choices
  if choices and value not in choices:
    refuse(f'one of {", ".join(choices)}')
  return value


def _check_bounds(meaning: Meaning, numbers: tuple, refuse) -> None:
  assert meaning.bounds is not None
  if not all(number in meaning.bounds for number in numbers):
    refuse(str(meaning.bounds))
  if meaning.length is not None and len(numbers) != meaning.length:
    refuse(f'{meaning.length} numbers')


def _fill_in(values: dict[str, Any]) -> None:
  """Replaces each None that follows from other fields."""
  bits = values['quant.activation_bits']
  following = {
    'quant.first_weight_bits': values['quant.weight_bits'],
    'quant.last_weight_bits': values['quant.weight_bits'],
    'quant.headroom': _HEADROOM.get(bits, _MOST_HEADROOM),
    # The fewer the bits, the further student and teacher can differ.
    'augment.adversarial': (8 - bits) / 40,
  }
  if values['budget'] is not None:
    for name, meaning in _MEANINGS.items():
      if meaning.recipe is not None:
        following[name] = max(1, round(values['budget'] * meaning.recipe))
    filled = [
      following[name] if values[name] is None else values[name]
      for name in ('schedule.generator_steps', 'schedule.joint_steps')
    ]
    # The pool holds at most the batches that the generator makes.
    pool = following['schedule.pool_batches']
    following['schedule.pool_batches'] = min(pool, sum(filled))
  for name, value in following.items():
    if values[name] is None:
      values[name] = value


def _check_schedule(values: dict[str, Any]) -> None:
  """Refuses fields whose values do not fit together."""
  channels = values['generator.channels']
  if channels is not None and len(channels) < 2:
    raise InputError(
      f'config.generator.channels={channels!r}: expected 2 or more numbers'
    )
  if values['budget'] is None:
    return  # the steps follow from the network
  joint, student = (
    values[f'schedule.{name}_steps'] for name in ('joint', 'student')
  )
  filled = values['schedule.generator_steps'] + joint
  pool = values['schedule.pool_batches']
  if not joint and not student:
    raise InputError(
      'config.schedule.joint_steps=0 and config.schedule.student_steps=0: the '
      'student would never train; expected one of them above 0'
    )
  if student and not 0 < pool <= filled:
    raise InputError(
      f'config.schedule.pool_batches={pool}: student steps draw from the pool; '
      f'expected 1 to generator_steps + joint_steps = {filled}'
    )
  if values['generator.workdir'] and joint:
    raise InputError(
      f'config.generator.workdir={values["generator.workdir"]!r} with '
      f'config.schedule.joint_steps={joint}: joint steps would train the '
      'generator; expected config.schedule.joint_steps=0'
    )


def to_json(config: Config) -> dict[str, Any]:
  """Returns the content of config.json: the schema and every value."""
  values = json.loads(json.dumps(dataclasses.asdict(config)))
  return {'schema': SCHEMA, **values}


def from_json(stored: dict[str, Any], where: str) -> Config:
  """Returns the config that a config.json stores.

  Args:
    stored: content of the file.
    where: workdir, for the error message.

  Raises:
    InputError: the file is damaged or has another schema.
  """
  check_schema(stored, where)
  config = presets.default_config()
  values = {name: value for name, value in stored.items() if name != 'schema'}
  try:
    config.update(values)
  except Exception as e:  # wrong types and names raise many kinds
    raise InputError(f'{where}: config.json is damaged ({e})') from e
  return resolve(config)


def check_schema(stored: dict[str, Any], where: str) -> None:
  """Refuses a config.json with another schema.

  Args:
    stored: content of the file.
    where: workdir, for the error message.

  Raises:
    InputError: the file has another schema.
  """
  if stored.get('schema') != SCHEMA:
    raise InputError(
      f'{where}: config.json has schema {stored.get("schema")!r}, expected '
      f'{SCHEMA}: another version of clusterq-jax made the run; choose another '
      'workdir (the student.safetensors of the run still loads)'
    )


def differences(stored: dict[str, Any], config: Config) -> list[str]:
  """Returns the training fields that differ, as 'field: old -> new'.

  Args:
    stored: content of config.json.
    config: resolved config to compare with it.
  """
  before = traverse_util.flatten_dict(stored, sep='.')
  after = traverse_util.flatten_dict(to_json(config), sep='.')
  return [
    f'{name}: {before.get(name)!r} -> {after.get(name)!r}'
    for name in sorted(before.keys() | after.keys())
    if name.split('.')[0] not in FREE and before.get(name) != after.get(name)
  ]


def describe(config: Config) -> str:
  """Formats every value with its meaning, at most 80 columns per line.

  Args:
    config: resolved config.
  """
  lines, section = [], ''
  for name, value in flatten(config).items():
    outer = name.rpartition('.')[0]
    if outer != section:
      lines.append('')
      section = outer
    lines.append(f'{name} = {value!r}')
    lines.append(_WRAPPER.fill(_MEANINGS[name].doc))
  return '\n'.join(lines)
