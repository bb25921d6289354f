"""Tests runs that start from another run's generator."""

import json
import runpy
import shutil

import pytest

from clusterq_jax import config as config_lib
from clusterq_jax.deploy import student
from clusterq_jax.errors import InputError
from clusterq_jax.modes.quantize import quantize

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def make_config(tiny_config_file):
  def make(bits=4, **fields):
    config = runpy.run_path(str(tiny_config_file))['get_config']()
    config.schedule.joint_steps = 0
    config.schedule.procedural_batches = 1
    config.quant.weight_bits = config.quant.activation_bits = bits
    config.update_from_flattened_dict(fields)
    return config

  return make


@pytest.fixture(scope='module')
def source(make_config, compile_cache, tmp_path_factory):
  folder = tmp_path_factory.mktemp('source') / 'run'
  quantize(make_config(), str(folder))
  return str(folder)


def test_the_student_is_that_of_a_run_with_a_generator_of_its_own(
  make_config, source, tmp_path
):
  other = {'bits': 8, 'quant.ranges': 'learned'}
  quantize(make_config(**other), str(tmp_path / 'own'))
  config = make_config(**other, **{'generator.workdir': source})
  results = quantize(config, str(tmp_path / 'taken'))
  for name in (student.FILE, 'samples.png'):
    own, taken = (tmp_path / run / name for run in ('own', 'taken'))
    assert own.read_bytes() == taken.read_bytes()
  lines = (tmp_path / 'taken' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [11, 12, 13]
  assert results['steps'] == 13


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'seed': 1}, 'seed: 0 -> 1'),
    ({'loss.sfda': 0.0}, 'loss.sfda: 0.9 -> 0.0'),
    ({'schedule.joint_steps': 1}, 'expected config.schedule.joint_steps=0'),
    ({'generator.workdir': 'nowhere'}, 'nowhere: found no run'),
  ],
)
def test_refuses(make_config, source, tmp_path, fields, message):
  config = make_config(**{'generator.workdir': source, **fields})
  with pytest.raises(InputError, match=message):
    quantize(config, str(tmp_path / 'run'))


def test_refuses_an_unfinished_run(make_config, source, tmp_path):
  begun = make_config(**{'schedule.student_steps': 4})
  folder = shutil.copytree(source, tmp_path / 'source')
  stored = config_lib.to_json(config_lib.resolve(begun))
  (folder / 'config.json').write_text(json.dumps(stored))
  config = make_config(**{'generator.workdir': str(folder)})
  with pytest.raises(InputError, match='not finished; expected .* step 14'):
    quantize(config, str(tmp_path / 'run'))
