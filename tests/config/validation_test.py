"""Values that are refused, and values that follow from others."""

import pytest

from clusterq_jax import config as config_lib
from clusterq_jax.config import fields
from clusterq_jax.config.presets import kind_of
from clusterq_jax.errors import InputError

_MEANINGS = fields.meanings()


def _set(config, field, value):
  *sections, name = field.split('.')
  for section in sections:
    config = config[section]
  with config.ignore_type():
    config[name] = value


def _kind(field):
  config = config_lib.default_config()
  section, _, name = field.rpartition('.')
  return (config[section] if section else config).get_type(name)


def test_what_follows_from_the_bits():
  config = config_lib.default_config()
  for bits, headroom, adversarial in (
    (2, 0.0, 0.15),
    (3, 0.1, 0.125),
    (4, 0.2, 0.1),
    (8, 0.2, 0.0),
  ):
    config.quant.activation_bits = bits
    resolved = config_lib.resolve(config)
    assert resolved.quant.headroom == headroom
    assert resolved.augment.adversarial == adversarial
  config.quant.headroom = 0.0
  config.quant.activation_bits = 4
  assert config_lib.resolve(config).quant.headroom == 0.0


def test_first_and_last_layer_have_the_bits_of_the_others():
  config = config_lib.default_config()
  config.quant.weight_bits = 3
  config.quant.last_weight_bits = 8
  quant = config_lib.resolve(config).quant
  assert (quant.first_weight_bits, quant.last_weight_bits) == (3, 8)


def _schedule(**changes):
  config = config_lib.default_config()
  for name, value in changes.items():
    _set(config, name if name == 'budget' else f'schedule.{name}', value)
  s = config_lib.resolve(config).schedule
  return (
    s.warmup_steps,
    s.generator_steps,
    s.joint_steps,
    s.student_steps,
    s.pool_batches,
    s.procedural_batches,
  )


def test_the_budget_scales_what_is_not_set():
  assert _schedule() == (400, 800, 0, 600, 200, 128)
  assert _schedule(budget=1 / 8) == (50, 100, 0, 75, 25, 16)
  assert _schedule(budget=1e-4) == (1, 1, 0, 1, 1, 1)
  assert _schedule(budget=2, student_steps=7) == (800, 1600, 0, 7, 400, 256)
  # The pool is not larger than what the generator makes.
  assert _schedule(generator_steps=3)[4] == 3


def test_the_presets_leave_nothing_to_the_budget():
  for preset in (config_lib.paper_config, config_lib.paper_imagenet_config):
    config = preset()
    before = config_lib.resolve(config)
    config.budget = 0.5
    after = config_lib.resolve(config)
    assert before.schedule == after.schedule
    assert before.schedule.joint_steps == 70_000


def test_description_has_every_field():
  text = config_lib.describe(config_lib.resolve(config_lib.default_config()))
  words = ' '.join(text.split())
  for field, meaning in _MEANINGS.items():
    assert f'\n{field} = ' in f'\n{text}'
    assert meaning.doc in words
  assert max(map(len, text.splitlines())) <= 80


# --- What is refused ---------------------------------------------------------

_REFUSED = [
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
  ('report.log_every', 0, '1 to '),
  ('checkpoint_every', 0, '1 to '),
  ('steps_per_call', 0, '1 to '),
  ('student.lr', float('nan'), 'finite'),
  ('student.lr', float('inf'), 'finite'),
  ('student.lr', -0.1, '0 to '),
  ('loss.sfda', float('nan'), 'finite'),
  ('loss.sfda', '1', 'a finite number'),
  ('augment.flip', 1, 'True or False'),
  ('seed', 2**31, 'a 32-bit integer'),
  ('seed', 0.5, 'a 32-bit integer'),
  ('eval.path', 3, 'a string'),
  ('teacher.mean', ('a',), 'finite numbers'),
  ('teacher.image_size', (0, 8), '1 to 32,767'),
  ('generator.channels', (8,), '2 or more numbers'),
  ('loss.relative', 'all', 'True or False'),
  ('loss.noise', (0.5,), '2 numbers'),
  ('centroids.decay', -0.1, '0 to 1'),
  ('centroids.decay', 1.5, '0 to 1'),
  ('loss.noise', (0.5, -1.0), '0 to 100'),
  ('teacher.image_size', (32,), '2 numbers'),
  ('teacher.num_classes', 0, '2 to'),
  ('augment.probability', 1.5, '0 to 1'),
  ('eval.resize', -1, '0 to'),
  ('schedule.joint_steps', 0, 'the student would never train'),
  ('schedule.student_steps', 5, 'schedule.pool_batches=0'),
]


@pytest.mark.parametrize(('field', 'value', 'expected'), _REFUSED)
def test_refused(field, value, expected):
  config = config_lib.paper_config()
  _set(config, field, value)
  with pytest.raises(InputError) as error:
    config_lib.resolve(config)
  message = str(error.value)
  assert f'config.{field}' in message or field == 'schedule.student_steps'
  assert expected in message
  assert '\n' not in message


def test_every_choice_is_refused_above():
  choices = {field for field, m in _MEANINGS.items() if m.choices}
  assert choices <= {field for field, _, _ in _REFUSED}


def test_bits_are_refused_before_what_follows_from_them():
  config = config_lib.default_config()
  config.quant.activation_bits = 1
  with pytest.raises(InputError, match='activation_bits=1: expected 2 to 8'):
    config_lib.resolve(config)


@pytest.mark.parametrize('field', ['nonsense', 'student.nonsense'])
def test_unknown_field_is_refused(field):
  config = config_lib.default_config().unlock()
  _set(config, field, 1)
  with pytest.raises(InputError, match=rf'config\.{field}: unknown field'):
    config_lib.resolve(config)


def test_missing_field_is_refused():
  config = config_lib.default_config().unlock()
  del config.student.lr
  with pytest.raises(InputError, match=r'config\.student\.lr: missing field'):
    config_lib.resolve(config)


@pytest.mark.parametrize('pool', [0, 6])
def test_pool_must_be_filled_before_it_is_used(pool):
  config = config_lib.default_config()
  config.schedule.generator_steps = 3
  config.schedule.joint_steps = 2
  config.schedule.student_steps = 1
  config.schedule.pool_batches = 5
  config_lib.resolve(config)
  config.schedule.pool_batches = pool
  with pytest.raises(InputError, match=f'pool_batches={pool}.*= 5'):
    config_lib.resolve(config)


# --- Bounds ------------------------------------------------------------------


def test_every_number_has_bounds_and_every_field_a_meaning():
  for field, meaning in _MEANINGS.items():
    number = _kind(field) in (int, float, tuple)
    assert number == (meaning.bounds is not None), field
    assert meaning.doc.endswith(('.', '5e:16x16.')), field


# What also depends on other fields.
_TOGETHER = (
  'schedule.student_steps',
  'schedule.joint_steps',
  'schedule.pool_batches',
)
_BOUNDED = [field for field, m in _MEANINGS.items() if m.bounds]


@pytest.mark.parametrize('field', _BOUNDED)
def test_numbers_out_of_bounds(field):
  meaning, kind = _MEANINGS[field], _kind(field)
  low, high, below = meaning.bounds
  whole = kind is int or field in ('teacher.image_size', 'generator.channels')

  def refused(number):
    config = config_lib.paper_config()
    value = (number,) * (meaning.length or 3) if kind is tuple else number
    _set(config, field, value)
    try:
      config_lib.resolve(config)
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


@pytest.mark.parametrize(
  ('annotation', 'kind'),
  [
    (int, int),
    (float | None, float),
    (tuple[int, ...], tuple),
    (tuple[float, ...] | None, tuple),
    (str | None, str),
  ],
)
def test_kind_of_an_annotation(annotation, kind):
  assert kind_of(annotation) is kind
