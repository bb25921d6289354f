"""Tests runs on images that are not square and have 1 or 4 channels."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import clusterq_jax as cq
from benchmarks import random_weights
from clusterq_jax.method import phases
from clusterq_jax.models import registry
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime import synthetic
from tests.reference import FastCompiler

_SIZE = 40, 24


class _Net(nn.Module):
  """One residual block; few layers compile quickly."""

  layers: cq.LayerSet
  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    layers = self.layers
    x = layers.input(name='input')(x)
    x = layers.conv_bn(8, 3, strides=2, act='relu', name='stem')(x)
    y = layers.conv_bn(8, 3, strides=1, name='conv')(x)
    x = layers.add(act='relu', name='add')(x, y)
    x = layers.global_avg_pool(name='pool')(x)
    return layers.dense(self.num_classes, name='classifier')(x)


@pytest.fixture(params=[1, 4])
def channels(request):
  return request.param


@pytest.fixture
def teacher_file(channels, monkeypatch, tmp_path):
  """Writes the weights and the graph of a network for images of 4 classes."""
  monkeypatch.setattr(registry, '_ARCHITECTURES', dict(registry._ARCHITECTURES))
  prep = Preprocessing(_SIZE, (0.5,) * channels, (0.25,) * channels)
  cq.register_network('net', _Net, {}, prep)
  path = tmp_path / 'weights.safetensors'
  random_weights.write(path, 'net', 4)
  registry._ARCHITECTURES.pop('net')  # the file carries its network
  return path


@pytest.mark.full
def test_a_run_that_sets_little(
  channels, teacher_file, monkeypatch, tmp_path, capfd
):
  monkeypatch.setattr(session_lib, 'Compiler', FastCompiler)
  monkeypatch.setattr(synthetic, 'HELD_OUT', 8)
  random = np.random.RandomState(0)
  images = random.randint(0, 256, (9, *_SIZE, channels), np.uint8)
  np.savez(tmp_path / 'a.npz', images=images, labels=np.arange(9) % 4)
  config = cq.quantize_config()
  config.teacher.weights = str(teacher_file)
  config.budget, config.schedule.batch_size = 1e-3, 8
  config.eval.source, config.eval.path = 'npz', str(tmp_path / 'a.npz')
  capfd.readouterr()

  results = cq.quantize(config, str(tmp_path / 'run'))

  stored = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert stored['generator']['channels'] == [128, 64, 32]
  assert stored['student']['lr'] == 6e-4
  assert results['steps'] == 1 + 1 + phases.PROCEDURAL_STEPS + 1
  assert results['student']['n'] == 9
  assert results['deployed']['agreement'] == 100
  assert results['forecast']['unlike'] == ['4 classes']
  picture = Image.open(tmp_path / 'run' / 'samples.png')
  assert picture.size == (2 * (10 * 25 - 1), 2 * (4 * 41 - 1))
  student = cq.load_student(tmp_path / 'run')
  assert student.logits(images).shape == (9, 4)
  assert 'estimate: about ' in capfd.readouterr().err
