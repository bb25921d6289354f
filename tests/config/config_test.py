"""Configurations: those that ship, and those that are refused."""

import json
import pathlib
import runpy

import pytest

from clusterq_jax import config as config_lib
from clusterq_jax.errors import InputError

_FILES = sorted(
  path
  for path in (pathlib.Path(__file__).parents[2] / 'configs').glob('*.py')
  if path.name != '__init__.py'
)


def _load(path):
  return runpy.run_path(str(path))['get_config']()


def _set(config, field, value):
  *sections, name = field.split('.')
  for section in sections:
    config = config[section]
  with config.ignore_type():
    config[name] = value


def _stored(config):
  return json.loads(config_lib.to_json(config))


def test_there_are_configs():
  assert {'cifar10_resnet20', 'cifar10_resnet20_fast'} <= {
    path.stem for path in _FILES
  }


@pytest.mark.parametrize('path', _FILES, ids=lambda path: path.stem)
def test_shipped_config(path):
  first, second = _load(path), _load(path)
  config_lib.validate(first)
  assert config_lib.flatten(first) == config_lib.flatten(second)
  assert not config_lib.differences(_stored(first), second)
  # A document: what, paper and command before the first line of code.
  words = path.read_text().split('"""')[1]
  assert 'arXiv' in words
  assert f'configs/{path.name}' in words
  # Nothing is shared between two loads.
  first.schedule.batch_size += 1
  assert config_lib.flatten(first) != config_lib.flatten(second)


def test_defaults_are_valid():
  config_lib.validate(config_lib.defaults())


def test_what_follows_from_the_bits_in_the_short_recipe():
  config = config_lib.fast()
  for bits, headroom, adversarial in (
    (2, 0.0, 0.15),
    (3, 0.1, 0.125),
    (4, 0.2, 0.1),
    (8, 0.2, 0.0),
  ):
    config.quant.activation_bits = bits
    assert config.quant.headroom == headroom
    assert config.augment.adversarial == adversarial
    stored = _stored(config)
    assert stored['quant']['headroom'] == headroom
    assert stored['augment']['adversarial'] == adversarial
  config.quant.headroom = 0.0
  config.quant.activation_bits = 4
  assert config.quant.headroom == 0.0


def test_bits_are_refused_before_what_follows_from_them():
  config = config_lib.fast()
  config.quant.activation_bits = 1
  with pytest.raises(InputError, match='activation_bits=1: expected 2 to 8'):
    config_lib.validate(config)


def test_a_field_that_came_later_had_its_default():
  config = config_lib.defaults()
  stored = _stored(config)
  del stored['generator']['conditional']
  assert config_lib.differences(stored, config) == []
  config.generator.conditional = True
  assert config_lib.differences(stored, config) == [
    'generator.conditional: False -> True'
  ]


def test_differences_name_field_and_both_values():
  config = config_lib.defaults()
  stored = _stored(config)
  assert config_lib.differences(stored, config) == []
  config.student.lr = 0.5
  config.generator.channels = (1, 2, 3)
  assert config_lib.differences(stored, config) == [
    'generator.channels: [128, 128, 64] -> [1, 2, 3]',
    'student.lr: 0.0001 -> 0.5',
  ]


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('eval.source', 'npz'),
    ('eval.path', 'x.npz'),
    ('eval.network', 'teacher'),
    ('eval.batch_size', 3),
    ('report.log_every', 7),
  ],
)
def test_differences_leave_out_what_may_differ(field, value):
  config = config_lib.defaults()
  stored = _stored(config)
  _set(config, field, value)
  config_lib.validate(config)
  assert config_lib.differences(stored, config) == []


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('teacher.arch', 'resnet21', 'resnet20'),
    ('compute_dtype', 'float16', 'float32, bfloat16'),
    ('quant.placement', 'everywhere', 'paper, integer'),
    ('quant.ranges', 'fixed', 'minmax, learned'),
    ('student.optimizer', 'lamb', 'sgd, adam'),
    ('loss.class_reduction', 'max', 'sum, mean'),
    ('schedule.lr_decay', 'linear', 'step, cosine'),
    ('eval.source', 'imagenet', 'none, fashion_mnist, npz'),
    ('eval.network', 'both', 'student, teacher'),
    ('quant.weight_bits', 1, '2 to 8'),
    ('quant.activation_bits', 9, '2 to 8'),
    ('quant.first_weight_bits', 1, '2 to 8'),
    ('quant.last_weight_bits', 16, '2 to 8'),
    ('quant.headroom', -0.01, '0 to '),
    ('augment.adversarial', -0.1, '0 to '),
    ('schedule.batch_size', 1, '2 to '),
    ('schedule.warmup_steps', -1, '0 to '),
    ('schedule.procedural_batches', -1, '0 to '),
    ('eval.synthetic_images', 1999, '2,000 to '),
    ('report.log_every', 0, '1 to '),
    ('checkpoint_every', 0, '1 to '),
    ('student.lr', float('nan'), 'finite'),
    ('student.lr', float('inf'), 'finite'),
    ('student.lr', -0.1, '0 to '),
    ('loss.sfda', float('nan'), 'finite'),
    ('loss.sfda', '1', 'a finite number'),
    ('augment.flip', 1, 'True or False'),
    ('seed', 2**31, 'a whole number of 32 bits'),
    ('seed', 0.5, 'a whole number of 32 bits'),
    ('eval.path', 3, 'a text'),
    ('teacher.mean', ('a',), 'finite numbers'),
    ('teacher.image_size', (0, 8), 'whole numbers above 0'),
    ('generator.channels', (8,), '2 or more numbers'),
    ('loss.relative', 'some', 'noise'),
    ('loss.noise', (0.5,), '2 numbers'),
    ('centroids.decay', -0.1, '0 to 1'),
    ('centroids.decay', 1.5, '0 to 1'),
    ('schedule.joint_steps', 0, 'the student would never train'),
    ('schedule.student_steps', 5, 'schedule.pool_batches=0'),
  ],
)
def test_refused(field, value, expected):
  config = config_lib.defaults()
  _set(config, field, value)
  with pytest.raises(InputError) as error:
    config_lib.validate(config)
  message = str(error.value)
  assert f'config.{field}' in message or field == 'schedule.student_steps'
  assert expected in message
  assert '\n' not in message


def test_every_choice_is_refused_above():
  refused = {
    mark.args[1][i][0]
    for mark in test_refused.pytestmark
    for i in range(len(mark.args[1]))
  }
  assert set(config_lib._CHOICES) <= refused


@pytest.mark.parametrize('field', ['nonsense', 'student.nonsense'])
def test_unknown_field_is_refused(field):
  config = config_lib.defaults().unlock()
  _set(config, field, 1)
  with pytest.raises(InputError, match=rf'config\.{field}: unknown field'):
    config_lib.validate(config)


def test_missing_field_is_refused():
  config = config_lib.defaults().unlock()
  del config.student.lr
  with pytest.raises(InputError, match=r'config\.student\.lr: missing field'):
    config_lib.validate(config)


@pytest.mark.parametrize('pool', [0, 6])
def test_pool_must_be_filled_before_it_is_used(pool):
  config = config_lib.defaults()
  config.schedule.generator_steps = 3
  config.schedule.joint_steps = 2
  config.schedule.student_steps = 1
  config.schedule.pool_batches = 5
  config_lib.validate(config)
  config.schedule.pool_batches = pool
  with pytest.raises(InputError, match=f'pool_batches={pool}.*= 5'):
    config_lib.validate(config)


# --- Bounds ------------------------------------------------------------------


def _numbers(value):
  several = value if isinstance(value, (tuple, list)) else (value,)
  return several and all(
    isinstance(n, (int, float)) and not isinstance(n, bool) for n in several
  )


def test_every_number_has_bounds():
  expected = config_lib.defaults()
  numbers = set()
  for field, value in config_lib.flatten(expected).items():
    section, _, name = field.rpartition('.')
    kind = (expected[section] if section else expected).get_type(name)
    if kind in (int, float, tuple) or (value is not None and _numbers(value)):
      numbers.add(field)
  assert numbers == set(config_lib._BOUNDS)


@pytest.mark.parametrize('field', config_lib._BOUNDS)
def test_numbers_out_of_bounds(field):
  low, high, below = config_lib._BOUNDS[field]
  expected = config_lib.defaults()
  section, _, name = field.rpartition('.')
  kind = (expected[section] if section else expected).get_type(name)
  whole = kind is int or field in config_lib._SIZES
  length = config_lib._LENGTHS.get(field, 3)

  def refused(number):
    config = config_lib.defaults()
    value = (number,) * length if kind is tuple else number
    _set(config, field, value)
    try:
      config_lib.validate(config)
    except InputError as e:
      return f'config.{field}=' in str(e)
    return False

  step = 1 if whole else 1e-7
  assert refused(low - step)
  assert refused(1e300 if not whole else 2**31)
  assert refused(high + (1 if whole else 1e-3 * max(high, 1)))
  assert refused(high) or not below
  for number in (low, high):
    if field not in _TOGETHER and not (below and number == high):
      assert not refused(number), number


# What also depends on other fields, or on others of the same tuple.
_TOGETHER = (
  'schedule.lr_boundaries',
  'schedule.student_steps',
  'schedule.joint_steps',
  'schedule.pool_batches',
)


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('augment.probability', 1.5, '0 to 1'),
    ('augment.mixup', -0.1, '0 to 1'),
    ('loss.sfda', -1.0, '0 to 1,000,000'),
    ('loss.noise', (0.5, -1.0), '0 to 100'),
    ('student.momentum', 1.0, '0 to below 1'),
    ('student.weight_decay', -1e-4, '0 to 1'),
    ('generator.betas', (0.5,), '2 numbers'),
    ('generator.betas', (0.5, 1.0), '0 to below 1'),
    ('teacher.num_classes', 0, '2 to'),
    ('teacher.pixel_range', 0.0, 'expected'),
    ('teacher.image_size', (32,), '2 numbers'),
    ('eval.resize', -1, '0 to'),
    ('schedule.lr_boundaries', (20, 10), 'ascending'),
    ('quant.headroom', 1e9, '0 to 1'),
  ],
)
def test_numbers_that_cannot_be_meant(field, value, expected):
  config = config_lib.defaults()
  _set(config, field, value)
  with pytest.raises(InputError, match=rf'config\.{field}=.*{expected}'):
    config_lib.validate(config)
