"""Weights as training scripts leave them: wrappers, prefixes, other names."""

import numpy as np
import pytest
import safetensors.numpy

from clusterq_jax import convert
from clusterq_jax.errors import InputError
from clusterq_jax.models import registry
from clusterq_jax.weights import fitting, layouts, matching

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.torch


def _state(seed=0, **changes):
  """A ResNet-8 as torch saves it."""
  layout = layouts.LAYOUTS['cifar_resnet'][0]
  random = np.random.RandomState(seed)
  options = {'in_channels': 3, 'num_classes': 4, **changes}
  channels = options.pop('in_channels')
  architecture = registry.architecture('resnet8')
  state = {}
  for layer in matching.layers_of(architecture, channels, **options):
    for leaf, shape in layer.shapes.items():
      value = random.rand(*layout.to_source(shape)).astype(np.float32)
      state[layout.key(layer, leaf)] = torch.tensor(value)
  return state


def _prefixed(prefix, state):
  return {f'{prefix}{key}': value for key, value in state.items()}


def _itself(state):
  wrapped = {'epoch': 3, 'net': state}
  wrapped['again'] = wrapped
  return wrapped


_WRAPPED = {
  'net': lambda s: {'net': s, 'acc': 91.2, 'epoch': 3},
  'model_state_dict': lambda s: {'epoch': 3, 'model_state_dict': s},
  'optimizer first': lambda s: {
    'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}, 'groups': [1]},
    'state_dict': s,
  },
  'nested': lambda s: {'checkpoint': {'weights': {'net': s}}, 'args': None},
  'with a tensor beside': lambda s: {'best': torch.tensor(0.5), 'net': s},
  'torch.compile': lambda s: _prefixed('_orig_mod.', s),
  'Lightning': lambda s: {
    'state_dict': _prefixed('model.', s),
    'pytorch-lightning_version': '2.1',
  },
  'stacked prefixes': lambda s: {
    'net': _prefixed('module._orig_mod.model.', s)
  },
  'averaged': lambda s: {
    'n_averaged': torch.tensor(7),
    **_prefixed('module.', s),
  },
  'within itself': _itself,
}


@pytest.mark.parametrize('wrap', _WRAPPED.values(), ids=_WRAPPED)
def test_wrapped(tmp_path, wrap):
  state = _state()
  torch.save(wrap(state), tmp_path / 'a.pt')
  loaded = fitting.load(tmp_path / 'a.pt', 'resnet8')
  np.testing.assert_array_equal(
    loaded.variables['params']['classifier']['bias'], state['linear.bias']
  )
  assert sum(
    leaf.size
    for layers in loaded.variables.values()
    for layer in layers.values()
    for leaf in layer.values()
  ) == sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
  'name', ['a.pth.tar', 'a.ckpt', 'a.bin', 'A.PTH', 'a.safetensors']
)
def test_torch_files_under_other_names(tmp_path, name):
  torch.save({'state_dict': _state()}, tmp_path / name)
  assert fitting.load(tmp_path / name, 'resnet8').layout == 'akamaster'


@pytest.mark.parametrize('name', ['a.pt', 'a.bin', 'a.npz', 'weights'])
def test_safetensors_under_other_names(tmp_path, name):
  state = {key: value.numpy() for key, value in _state().items()}
  safetensors.numpy.save_file(state, tmp_path / name)
  assert fitting.load(tmp_path / name, 'resnet8').layout == 'akamaster'


def test_averaged_weights_beside_the_others(tmp_path):
  path, state, average = tmp_path / 'a.pt', _state(0), _state(1)
  torch.save({'model_ema': average, 'model': state}, path)
  loaded = fitting.load(path, 'resnet8')
  assert "entry 'model'; not read: 'model_ema' (" in loaded.report
  (note,) = loaded.notes
  assert "from the entry 'model'; 'model_ema' would fit" in note
  found = fitting.load(path, 'resnet8', 'model_ema')
  np.testing.assert_array_equal(
    found.variables['params']['classifier']['bias'], average['linear.bias']
  )
  assert not found.notes
  report = convert.convert(
    'resnet8', str(path), str(tmp_path / 'a.safetensors'), entry='model_ema'
  )
  assert "Read the entry 'model_ema'; not read: 'model' (" in report
  with pytest.raises(
    InputError, match="no entry 'ema'.*found model_ema, model"
  ):
    fitting.load(path, 'resnet8', 'ema')


def test_what_fits_nowhere_is_described(tmp_path):
  path, state = tmp_path / 'a.pt', _state()
  del state['bn1.weight']
  torch.save({'net': _prefixed('backbone.', state), 'x': torch.ones(2)}, path)
  with pytest.raises(InputError) as caught:
    fitting.load(path, 'resnet8')
  message = str(caught.value)
  assert '1 missing (bn1.weight)' in message
  assert "1 tensors at the top level, 36 tensors in the entry 'net'" in message
  assert 'all keys start with backbone.' in message


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'in_channels': 2}, 'take 2 input channels'),
    ({'in_channels': 5}, 'take 5 input channels'),
    ({'num_classes': 1}, 'classifier has 1 class'),
  ],
)
def test_convert_refuses_what_no_run_supports(tmp_path, changes, message):
  torch.save(_state(**changes), tmp_path / 'a.pt')
  output = tmp_path / 'a.safetensors'
  with pytest.raises(InputError, match=message):
    convert.convert('resnet8', str(tmp_path / 'a.pt'), str(output))
  assert not output.exists()


def test_batch_norm_that_was_never_trained(tmp_path):
  state = _state()
  for key, value in state.items():
    if key.endswith('running_mean'):
      value.zero_()
    if key.endswith('running_var'):
      value.fill_(1)
  torch.save(state, tmp_path / 'a.pt')
  (note,) = fitting.load(tmp_path / 'a.pt', 'resnet8').notes
  assert 'WARNING' in note
  assert '7 of 7 BatchNorm layers have mean 0 and variance 1' in note
