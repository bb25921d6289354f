"""Configs that ship, and what config.json tells of a run."""

import json
import pathlib
import runpy

import pytest

from clusterq_jax import config as config_lib
from clusterq_jax.errors import InputError

_FOLDER = pathlib.Path(__file__).parents[2] / 'configs'
_FILES = sorted([*_FOLDER.glob('*.py'), *_FOLDER.glob('paper/*.py')])


def _load(path):
  return runpy.run_path(str(path))['get_config']()


def _set(config, field, value):
  *sections, name = field.split('.')
  for section in sections:
    config = config[section]
  with config.ignore_type():
    config[name] = value


def _stored(config):
  return config_lib.to_json(config_lib.resolve(config))


def _name(path):
  return str(path.relative_to(_FOLDER).with_suffix(''))


def test_there_are_configs():
  names = [_name(path) for path in _FILES]
  assert {'fashion_mnist_resnet20', 'paper/cifar10_resnet20'} <= set(names)


@pytest.mark.parametrize('path', _FILES, ids=_name)
def test_shipped_config(path):
  first, second = _load(path), _load(path)
  resolved = config_lib.resolve(first)
  assert config_lib.flatten(first) == config_lib.flatten(second)
  assert not config_lib.differences(_stored(first), resolved)
  # A document: what, paper and command before the first line of code.
  words = path.read_text().split('"""')[1]
  assert 'arXiv' in words
  assert f'configs/{_name(path)}.py' in words
  # Nothing is shared between two loads.
  first.seed += 1
  assert config_lib.flatten(first) != config_lib.flatten(second)


def test_a_config_is_read_back():
  config = config_lib.default_config()
  config.budget = 0.5
  config.teacher.mean = (0.5,)
  stored = json.loads(json.dumps(_stored(config)))
  assert config_lib.from_json(stored, 'here') == config_lib.resolve(config)


@pytest.mark.parametrize('schema', [None, 1, 'x'])
def test_another_version_is_refused(schema):
  stored = _stored(config_lib.default_config()) | {'schema': schema}
  if schema is None:
    del stored['schema']
  with pytest.raises(InputError, match=r'here: config.json has schema .* 2'):
    config_lib.from_json(stored, 'here')


def test_a_damaged_config_is_refused():
  stored = _stored(config_lib.default_config()) | {'teacher': 3}
  with pytest.raises(InputError, match='here: config.json is damaged'):
    config_lib.from_json(stored, 'here')


def test_differences_name_field_and_both_values():
  config = config_lib.paper_config()
  stored = _stored(config)
  assert config_lib.differences(stored, config_lib.resolve(config)) == []
  config.student.lr = 0.5
  config.generator.channels = (1, 2, 3)
  assert config_lib.differences(stored, config_lib.resolve(config)) == [
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
    ('steps_per_call', 7),
  ],
)
def test_differences_leave_out_what_may_differ(field, value):
  config = config_lib.paper_config()
  stored = _stored(config)
  _set(config, field, value)
  config_lib.resolve(config)
  assert config_lib.differences(stored, config_lib.resolve(config)) == []
