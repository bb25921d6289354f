"""Whether a file's tensors are those of a network, and what differs."""

import numpy as np
import pytest

from clusterq_jax.errors import InputError
from clusterq_jax.models import registry
from clusterq_jax.weights import files, fitting, layouts, matching
from tests.weights.states import akamaster, pytorchcv, refusal, save


def test_own_format_round_trip(tmp_path, weights):
  source = fitting.load(
    save(tmp_path / 'a.safetensors', akamaster(conv_shortcut=True)),
    'resnet20',
  )
  metadata = {'format': fitting.FORMAT, 'arch': 'resnet20', 'mean': '0.5'}
  files.write_safetensors(weights, source.variables, metadata)
  loaded = fitting.load(weights, 'resnet20')
  assert loaded.layout == 'clusterq'
  assert loaded.metadata == metadata
  assert loaded.graph == source.graph
  for collection, layers in source.variables.items():
    assert loaded.variables[collection].keys() == layers.keys()
    for name, leaves in layers.items():
      for leaf, value in leaves.items():
        found = loaded.variables[collection][name][leaf]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value)
  message = refusal(fitting.load, weights, 'resnet32')
  assert "metadata arch is 'resnet20', expected 'resnet32'" in message
  assert 'set config.teacher.arch=resnet20' in message
  files.write_safetensors(weights, source.variables, {'arch': 'resnet20'})
  message = refusal(fitting.load, weights, 'resnet20')
  assert fitting.FORMAT in message


def test_npz_is_what_safetensors_is(tmp_path, weights):
  state = {f'module.{k}': v for k, v in akamaster().items()}
  state['module.linear.weight'] = state['module.linear.weight'].astype(float)
  path = tmp_path / 'w.npz'
  np.savez(path, **state)
  ours = fitting.load(path, 'resnet20')
  theirs = fitting.load(save(weights, state), 'resnet20')
  assert ours.report == theirs.report.replace(str(weights), str(path))
  for collection, layers in theirs.variables.items():
    for name, leaves in layers.items():
      for leaf, value in leaves.items():
        found = ours.variables[collection][name][leaf]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value)


def test_unknown_arch(weights):
  with pytest.raises(InputError, match="'resnet51'.*resnet110"):
    fitting.load(weights, 'resnet51')


@pytest.mark.parametrize('rename', [dict, pytorchcv])
def test_another_depth_is_named(weights, rename):
  path = save(weights, rename(akamaster()))
  message = refusal(fitting.load, path, 'resnet32')
  assert '60 missing' in message
  assert ', 0 unexpected, 0 of another shape' in message
  assert message.endswith(
    'the file holds a resnet20; set config.teacher.arch=resnet20'
  )
  save(weights, rename(akamaster(2)))
  message = refusal(fitting.load, path, 'resnet20')
  assert message.startswith(f'{path} does not fit resnet20: ')
  assert 'set config' not in message


def test_differences_are_counted_and_named(weights):
  state = akamaster()
  del state['layer3.0.conv2.weight']
  state |= {f'extra{n}.weight': np.ones(1, np.float32) for n in range(7)}
  state['layer1.2.bn1.bias'] = np.ones(17, np.float32)
  message = refusal(fitting.load, save(weights, state), 'resnet20')
  assert '1 missing (layer3.0.conv2.weight)' in message
  assert '7 unexpected (extra0.weight, ' in message
  assert 'extra4.weight, ...)' in message
  assert 'extra5' not in message
  shape = 'layer1.2.bn1.bias is [17], expected [16]'
  assert f'1 of another shape ({shape})' in message
  assert 'holds a' not in message


@pytest.mark.parametrize(
  ('key', 'shape'),
  [
    ('linear.bias', (11,)),
    ('linear.weight', (10, 256)),
    ('linear.weight', (10, 64, 1, 1)),
    ('conv1.weight', (16, 3)),
    ('layer2.1.conv1.weight', (3, 3, 32, 32)),
  ],
)
def test_shape_faults(weights, key, shape):
  state = akamaster() | {key: np.ones(shape, np.float32)}
  message = refusal(fitting.load, save(weights, state), 'resnet20')
  assert '0 missing, 0 unexpected' in message
  assert key in message


@pytest.mark.parametrize('key', ['linear.weight', 'conv1.weight'])
def test_missing_entry_that_decides_an_option(weights, key):
  state = akamaster()
  del state[key]
  message = refusal(fitting.load, save(weights, state), 'resnet20')
  assert f'1 missing ({key}), 0 unexpected, 0 of another shape' in message


def test_foreign_layout(weights):
  state = {f'blocks.{n}.running_mean': np.ones(3, np.float32) for n in (1, 2)}
  message = refusal(fitting.load, save(weights, state), 'resnet20')
  assert 'no layout known for resnet20 (blocks.1.running_mean' in message
  assert 'akamaster, pytorchcv, clusterq' in message


def test_no_batch_norm_statistics(weights):
  state = {k: v for k, v in akamaster().items() if 'running' not in k}
  message = refusal(fitting.load, save(weights, state), 'resnet20')
  assert 'needs a teacher with BatchNorm statistics' in message
  assert 'networks that load by name are resnet8, ' in message


@pytest.mark.parametrize(
  'key',
  [
    'layer1.0.se.fc1.weight',  # timm
    'blocks.0.0.se.conv_reduce.weight',
    'features.stage1.unit1.se.conv1.weight',  # pytorchcv
    'features.1.block.1.fc1.weight',  # torchvision
    '_blocks.0._se_reduce.weight',  # efficientnet-pytorch
  ],
)
def test_squeeze_and_excitation(weights, key):
  state = akamaster() | {key: np.ones((4, 16, 1, 1), np.float32)}
  message = refusal(fitting.load, save(weights, state), 'resnet20')
  assert f'no network with a name has squeeze-and-excitation ({key})' in message
  assert 'networks that load by name are resnet8, ' in message


@pytest.mark.parametrize('name', ['resnet20', 'mobilenet_v2'])
def test_transposed_kernels(weights, name):
  if name == 'resnet20':
    state = akamaster()
  else:
    layout = layouts.LAYOUTS[name][0]
    state = {
      layout.key(layer, leaf): np.ones(layout.to_source(shape), np.float32)
      for layer in matching.layers_of(
        registry.architecture(name), 3, num_classes=5
      )
      for leaf, shape in layer.shapes.items()
    }
  fitting.load(save(weights, state), name)
  first = next(iter(state))
  flax = {
    k: v.transpose(2, 3, 1, 0) if v.ndim == 4 else v.T for k, v in state.items()
  }
  message = refusal(fitting.load, save(weights, flax), name)
  shape = list(flax[first].shape)
  assert f'kernels are transposed ({first} is {shape})' in message
  # Depthwise kernels of TensorFlow itself are [height, width, channels, 1].
  depthwise = {
    k: v.transpose(0, 1, 3, 2) if v.shape[2:3] == (1,) else v
    for k, v in flax.items()
  }
  message = refusal(fitting.load, save(weights, depthwise), name)
  assert 'kernels are transposed' in message


def test_negative_variance(weights):
  state = akamaster()
  state['layer2.0.bn1.running_var'][[3, 5]] = -1e-3
  message = refusal(fitting.load, save(weights, state), 'resnet20')
  assert 'layer2.0.bn1.running_var has 2 negative variance(s) of 32' in message


def test_integer_weights(weights):
  state = akamaster()
  state['conv1.weight'] = state['conv1.weight'].astype(np.int8)
  message = refusal(fitting.load, save(weights, state), 'resnet20')
  assert 'conv1.weight is int8' in message
