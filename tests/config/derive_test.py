"""Values that follow from the network, at the sizes that networks have."""

import pytest

from clusterq_jax import config as config_lib
from clusterq_jax.config import derive

_SMALL = (128, 64, 32)
_LARGE = (128, 96, 64, 32, 16, 8)
# Image size, classes: channels, batch, learning rate, 1 / budget, images per
# class, evaluation batch.
_TABLE = {
  ((28, 28), 10): (_SMALL, 64, 6e-4, 1, 32, 64),
  ((32, 32), 10): (_SMALL, 64, 6e-4, 1, 32, 64),
  ((32, 32), 100): (_SMALL, 64, 6e-4, 1, 32, 64),
  ((32, 32), 1000): (_SMALL, 64, 6e-4, 1, 3, 64),
  ((40, 24), 4): (_SMALL, 64, 6e-4, 1, 32, 64),
  ((64, 64), 200): ((128, 96, 64, 32), 64, 6e-4, 2, 16, 64),
  ((96, 96), 10): ((128, 96, 64, 32, 16), 64, 6e-4, 4, 32, 64),
  ((160, 160), 1000): (_LARGE, 32, 3e-4, 6, 1, 64),
  ((192, 256), 1000): (_LARGE, 16, 1.5e-4, 6, 1, 51),
  ((224, 224), 1000): (_LARGE, 16, 1.5e-4, 6, 1, 50),
  ((299, 299), 1000): (_LARGE, 8, 7.5e-5, 5, 1, 28),
}


@pytest.mark.parametrize(('network', 'expected'), _TABLE.items())
def test_rules(network, expected):
  channels, batch, lr, shorter, images, evaluated = expected
  assert derive.values(*network) == {
    'budget': 1 / shorter,
    'generator.channels': channels,
    'student.lr': lr,
    'student.quant_lr': pytest.approx(lr / 0.3),
    'centroids.images_per_class': images,
    'schedule.batch_size': batch,
    'eval.batch_size': evaluated,
  }


@pytest.mark.parametrize('side', [1, 8, 16, 48, 112, 260, 512, 2000])
def test_any_size_gives_values_that_a_config_accepts(side):
  config = config_lib.quantize_config()
  config.update_from_flattened_dict(derive.values((side, 2 * side), 5))
  resolved = config_lib.resolve(config)
  assert resolved.generator.channels[0] <= 128
  # The generator makes images of at least the size, not of twice the size.
  scale = 2 ** (len(resolved.generator.channels) - 1)
  assert scale < max(4, side)


def test_first_semantic_layer():
  found = [derive.first_semantic_layer(n) for n in (1, 2, 3, 5, 9, 19, 50)]
  assert found == [0, 0, 0, 1, 3, 8, 23]


def test_what_a_user_sets_wins():
  config = config_lib.quantize_config()
  config.budget = 1 / 2
  config.generator.channels = (8, 8)
  config.schedule.batch_size = 4
  config.schedule.student_steps = 7
  found = config_lib.complete(config_lib.resolve(config), (224, 224), 1000)
  assert found.budget == 1 / 2
  assert found.generator.channels == (8, 8)
  assert found.schedule.batch_size == 4
  assert found.student.lr == 1.5e-4
  s = found.schedule
  assert (s.warmup_steps, s.generator_steps, s.student_steps) == (200, 400, 7)
  # A complete config stays as it is.
  assert config_lib.complete(found, (32, 32), 10) == found


def test_configs_without_a_budget():
  config = config_lib.quantize_config()
  assert (config.quant.weight_bits, config.quant.activation_bits) == (8, 8)
  resolved = config_lib.resolve(config)
  assert resolved.teacher.arch == resolved.teacher.weights == ''
  assert resolved.schedule.student_steps is None
  # At 32 x 32 pixels it is the short recipe with other bits.
  found = config_lib.complete(resolved, (32, 32), 10)
  other = config_lib.default_config()
  other.quant.weight_bits = other.quant.activation_bits = 8
  short = config_lib.complete(config_lib.resolve(other), (32, 32), 10)
  assert found.schedule == short.schedule
  assert (found.generator, found.student) == (short.generator, short.student)
  # On ImageNet it is imagenet_config with other bits.
  large = config_lib.resolve(config_lib.imagenet_config())
  assert large.quant.activation_bits == 8
  large = config_lib.complete(large, (224, 224), 1000)
  assert large.budget == 1 / 6
  s = large.schedule
  assert (s.batch_size, s.warmup_steps, s.student_steps) == (16, 67, 100)
  found = config_lib.complete(resolved, (224, 224), 1000)
  assert found.schedule == large.schedule
