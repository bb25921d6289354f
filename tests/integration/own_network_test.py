"""Tests the example of an own network, from its config to an exported file."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from clusterq_jax import load_student
from clusterq_jax.models import registry
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime import synthetic
from tests.reference import FastCompiler

_CONFIG = (
  pathlib.Path(__file__).resolve().parents[2]
  / 'configs'
  / 'cifar100_variant.py'
)
_STEPS = (
  '--config.quant.placement=integer',
  '--config.quant.ranges=minmax',
  '--config.centroids.first_layer=21',
  '--config.centroids.images_per_class=1',
  '--config.generator.channels=(8, 8, 8)',
  '--config.schedule.batch_size=8',
  '--config.schedule.warmup_steps=0',
  '--config.schedule.generator_steps=1',
  '--config.schedule.student_steps=2',
  '--config.schedule.pool_batches=1',
  '--config.schedule.procedural_batches=0',
)


def test_the_network_file_is_short():
  (file,) = (_CONFIG.parent / 'networks').glob('*.py')
  assert len(file.read_text().splitlines()) < 80


@pytest.mark.torch
def test_the_teacher_is_as_good_as_in_torch(data_dir, command, tmp_path):
  pytest.importorskip('torch')
  code, out, err = command(
    f'--config={_CONFIG}',
    f'--workdir={tmp_path / "run"}',
    '--mode=evaluate',
    '--config.eval.network=teacher',
    '--config.eval.source=npz',
    f'--config.eval.path={data_dir / "cifar100_dev.npz"}',
    '--config.teacher.weights='
    f'{data_dir / "weights" / "resnet20_cifar100_variant.pt"}',
  )
  assert code == 0, err
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert results['teacher']['top1'] == 69.98


def _state(random):
  """Returns a state dict with the names and shapes that torch would save."""
  state = {}

  def conv_bn(conv, bn, cout, cin, side):
    deviation = np.sqrt(1 / (cin * side**2))
    kernel = deviation * random.randn(cout, cin, side, side)
    state[f'{conv}.weight'] = kernel
    for leaf, shift in (('weight', 1), ('bias', 0)):
      state[f'{bn}.{leaf}'] = shift + 0.3 * random.randn(cout)
    state[f'{bn}.running_mean'] = 0.3 * random.randn(cout)
    state[f'{bn}.running_var'] = random.uniform(0.5, 1.5, cout)

  conv_bn('conv1', 'bn1', 64, 3, 3)
  cin = 64
  for stage, width in ((1, 16), (2, 32), (3, 64)):
    for i in range(3):
      name = f'layer{stage}.{i}'
      conv_bn(f'{name}.conv1', f'{name}.bn1', width, cin, 3)
      conv_bn(f'{name}.conv2', f'{name}.bn2', width, width, 3)
      if i == 0:
        conv_bn(f'{name}.shortcut.0', f'{name}.shortcut.1', width, cin, 1)
      cin = width
  state['linear.weight'] = random.randn(100, 256) / 16
  state['linear.bias'] = random.randn(100)
  return {key: value.astype(np.float32) for key, value in state.items()}


@pytest.mark.slow
def test_quantized_and_exported(command, compile_cache, tmp_path, monkeypatch):
  del compile_cache
  onnxruntime = pytest.importorskip('onnxruntime')
  pytest.importorskip('onnx')
  monkeypatch.setattr(registry, '_ARCHITECTURES', dict(registry._ARCHITECTURES))
  random = np.random.RandomState(0)
  weights = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(_state(random), weights)
  # The config works from any folder.
  monkeypatch.chdir(tmp_path)

  monkeypatch.setattr(session_lib, 'Compiler', FastCompiler)
  monkeypatch.setattr(synthetic, 'HELD_OUT', 8)
  code, _, err = command(
    f'--config={_CONFIG}',
    '--workdir=run',
    f'--config.teacher.weights={weights}',
    *_STEPS,
  )
  assert code == 0, err
  options = onnxruntime.SessionOptions()
  options.add_session_config_entry('session.x64quantprecision', '1')
  session = onnxruntime.InferenceSession('run/export/integer.onnx', options)
  images = random.randint(0, 256, (64, 32, 32, 3), np.uint8)
  (logits,) = session.run(None, {'images': images})
  folded = load_student('run').integer()
  np.testing.assert_array_equal(jax.jit(folded.logits)(images), logits)
  assert np.ptp(logits, 0).min() > 0
  # Residual adds without an activation are signed.
  assert folded.layers['stage1_block1_add'].grid.zero == 128
  assert folded.layers['stage1_block3_add'].grid.zero == 0
