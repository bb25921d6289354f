"""Weight files: what is read, what is refused, and in which words."""

import os
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from clusterq_jax.errors import InputError
from clusterq_jax.models import registry
from clusterq_jax.weights import files, fitting, layouts, matching

_STATS = ('weight', 'bias', 'running_mean', 'running_var')


def _akamaster(blocks=3, channels=3, classes=10, conv_shortcut=False):
  """A state dict written out from the source's model, not from our table."""
  random = np.random.RandomState(0)
  state = {}

  def conv_bn(conv, bn, *shape):
    state[f'{conv}.weight'] = random.randn(*shape).astype(np.float32)
    for stat in _STATS:
      state[f'{bn}.{stat}'] = random.rand(shape[0]).astype(np.float32)
    state[f'{bn}.num_batches_tracked'] = np.array(7, np.int64)

  conv_bn('conv1', 'bn1', 16, channels, 3, 3)
  cin = 16
  for stage, width in ((1, 16), (2, 32), (3, 64)):
    for i in range(blocks):
      name = f'layer{stage}.{i}'
      conv_bn(f'{name}.conv1', f'{name}.bn1', width, cin, 3, 3)
      conv_bn(f'{name}.conv2', f'{name}.bn2', width, width, 3, 3)
      if conv_shortcut and cin != width:
        conv_bn(f'{name}.shortcut.0', f'{name}.shortcut.1', width, cin, 1, 1)
      cin = width
  state['linear.weight'] = random.randn(classes, 64).astype(np.float32)
  state['linear.bias'] = random.randn(classes).astype(np.float32)
  return state


def _pytorchcv(state):
  """The same tensors under pytorchcv's names."""
  renamed = {}
  for key, value in state.items():
    parts = key.split('.')
    if parts[0] == 'linear':
      key = f'output.{parts[1]}'
    elif parts[0] in ('conv1', 'bn1'):
      key = f'features.init_block.{parts[0][:-1]}.{parts[1]}'
    else:
      unit = f'features.stage{parts[0][-1]}.unit{int(parts[1]) + 1}'
      if parts[2] == 'shortcut':
        kind = ('conv', 'bn')[int(parts[3])]
        key = f'{unit}.identity_conv.{kind}.{parts[4]}'
      else:
        kind, number = parts[2][:-1], parts[2][-1]
        key = f'{unit}.body.conv{number}.{kind}.{parts[3]}'
    renamed[key] = value
  return renamed


def _save(path, state, metadata=None):
  safetensors.numpy.save_file(state, path, metadata)
  return path


def _refusal(function, *args):
  """The one line that `function` refuses its arguments with."""
  with pytest.raises(InputError) as caught:
    function(*args)
  message = str(caught.value)
  assert '\n' not in message
  assert str(args[0]) in message
  return message


@pytest.fixture
def weights(tmp_path):
  """Where a test writes its safetensors file."""
  return tmp_path / 'w.safetensors'


# --- Layouts -----------------------------------------------------------------


def _check_real_resnet20(loaded):
  params, stats = loaded.variables['params'], loaded.variables['batch_stats']
  assert loaded.options == {
    'in_channels': 3,
    'num_classes': 10,
    'shortcut': 'pad',
  }
  assert loaded.layout == 'akamaster'
  assert set(params) == set(stats) | {'classifier'}
  assert len(stats) == 19
  assert params['stem']['kernel'].shape == (3, 3, 3, 16)
  assert params['stage2_block1_conv1']['kernel'].shape == (3, 3, 16, 32)
  assert params['stage3_block3_conv2']['scale'].shape == (64,)
  assert stats['stage3_block3_conv2']['var'].shape == (64,)
  assert params['classifier']['kernel'].shape == (64, 10)
  # 0.27 M parameters in He et al. 2016, table 6.
  assert '269,722 parameters, 19 BatchNorm layers' in loaded.report


@pytest.mark.torch
def test_real_resnet20(data_dir):
  torch = pytest.importorskip('torch')
  path = data_dir / 'weights' / 'resnet20-12fca82f.th'
  if not path.is_file():
    pytest.skip(f'no {path}')
  loaded = fitting.load(path, 'resnet20')
  _check_real_resnet20(loaded)
  state = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
  np.testing.assert_array_equal(
    loaded.variables['params']['stage2_block1_conv1']['kernel'],
    state['module.layer2.0.conv1.weight'].permute(2, 3, 1, 0).numpy(),
  )
  np.testing.assert_array_equal(
    loaded.variables['batch_stats']['stage1_block2_conv2']['mean'],
    state['module.layer1.1.bn2.running_mean'].numpy(),
  )


def test_every_leaf_comes_from_its_source(weights):
  state = _akamaster(conv_shortcut=True)
  loaded = fitting.load(_save(weights, state), 'resnet20')
  params, stats = loaded.variables['params'], loaded.variables['batch_stats']
  pairs = {
    'stem': ('conv1', 'bn1'),
    'stage1_block1_conv2': ('layer1.0.conv2', 'layer1.0.bn2'),
    'stage3_block2_conv1': ('layer3.1.conv1', 'layer3.1.bn1'),
    'stage2_block1_shortcut': ('layer2.0.shortcut.0', 'layer2.0.shortcut.1'),
  }
  for ours, (conv, bn) in pairs.items():
    kernel = np.einsum('oihw->hwio', state[f'{conv}.weight'])
    np.testing.assert_array_equal(params[ours]['kernel'], kernel)
    for tree, leaf, stat in (
      (params, 'scale', 'weight'),
      (params, 'bias', 'bias'),
      (stats, 'mean', 'running_mean'),
      (stats, 'var', 'running_var'),
    ):
      np.testing.assert_array_equal(tree[ours][leaf], state[f'{bn}.{stat}'])
  dense = params['classifier']
  np.testing.assert_array_equal(dense['kernel'].T, state['linear.weight'])
  np.testing.assert_array_equal(dense['bias'], state['linear.bias'])
  # Every tensor of the file ends up in the tree, counters excepted.
  leaves = sum(len(v) for tree in (params, stats) for v in tree.values())
  assert leaves == sum('num_batches' not in key for key in state)


def test_kernel_order_by_hand():
  # Value = 1000 cout + 100 cin + 10 row + column, with four distinct sizes.
  torch_order = np.array(
    [
      [
        [[1000 * o + 100 * i + 10 * h + w for w in range(5)] for h in range(4)]
        for i in range(3)
      ]
      for o in range(2)
    ]
  )
  akamaster, _, own = layouts.LAYOUTS['cifar_resnet']
  flax_order = akamaster.to_flax(torch_order)
  assert flax_order.shape == (4, 5, 3, 2)
  assert flax_order[3, 4, 2, 1] == 1234
  assert flax_order[1, 0, 2, 0] == 210
  assert own.to_flax(flax_order)[3, 4, 2, 1] == 1234


@pytest.mark.parametrize('conv_shortcut', [False, True])
def test_pytorchcv_holds_the_same_tensors(tmp_path, conv_shortcut):
  state = _akamaster(5, 1, 7, conv_shortcut)
  ours = fitting.load(_save(tmp_path / 'a.safetensors', state), 'resnet32')
  theirs = fitting.load(
    _save(tmp_path / 'b.safetensors', _pytorchcv(state)), 'resnet32'
  )
  assert (ours.layout, theirs.layout) == ('akamaster', 'pytorchcv')
  assert ours.options == theirs.options
  assert ours.options == {
    'in_channels': 1,
    'num_classes': 7,
    'shortcut': 'conv' if conv_shortcut else 'pad',
  }
  for collection, layers in ours.variables.items():
    assert theirs.variables[collection].keys() == layers.keys()
    for name, leaves in layers.items():
      for leaf, value in leaves.items():
        np.testing.assert_array_equal(
          theirs.variables[collection][name][leaf], value
        )


def test_own_format_round_trip(tmp_path, weights):
  source = fitting.load(
    _save(tmp_path / 'a.safetensors', _akamaster(conv_shortcut=True)),
    'resnet20',
  )
  metadata = {'format': fitting.FORMAT, 'arch': 'resnet20', 'mean': '0.5'}
  files.write_safetensors(weights, source.variables, metadata)
  loaded = fitting.load(weights, 'resnet20')
  assert loaded.layout == 'clusterq'
  assert loaded.metadata == metadata
  assert loaded.options == source.options
  for collection, layers in source.variables.items():
    assert loaded.variables[collection].keys() == layers.keys()
    for name, leaves in layers.items():
      for leaf, value in leaves.items():
        found = loaded.variables[collection][name][leaf]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value)
  message = _refusal(fitting.load, weights, 'resnet32')
  assert "metadata arch is 'resnet20', expected 'resnet32'" in message
  assert 'set config.teacher.arch=resnet20' in message
  files.write_safetensors(weights, source.variables, {'arch': 'resnet20'})
  message = _refusal(fitting.load, weights, 'resnet20')
  assert fitting.FORMAT in message


def test_unknown_arch(weights):
  with pytest.raises(InputError, match="'resnet51'.*resnet110"):
    fitting.load(weights, 'resnet51')


@pytest.mark.parametrize('rename', [dict, _pytorchcv])
def test_another_depth_is_named(weights, rename):
  path = _save(weights, rename(_akamaster()))
  message = _refusal(fitting.load, path, 'resnet32')
  assert '60 missing' in message
  assert ', 0 unexpected, 0 of another shape' in message
  assert message.endswith(
    'the file holds a resnet20; set config.teacher.arch=resnet20'
  )
  _save(weights, rename(_akamaster(2)))
  message = _refusal(fitting.load, path, 'resnet20')
  assert message.startswith(f'{path} does not fit resnet20: ')
  assert 'set config' not in message


def test_differences_are_counted_and_named(weights):
  state = _akamaster()
  del state['layer3.0.conv2.weight']
  state |= {f'extra{n}.weight': np.ones(1, np.float32) for n in range(7)}
  state['layer1.2.bn1.bias'] = np.ones(17, np.float32)
  message = _refusal(fitting.load, _save(weights, state), 'resnet20')
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
  state = _akamaster() | {key: np.ones(shape, np.float32)}
  message = _refusal(fitting.load, _save(weights, state), 'resnet20')
  assert '0 missing, 0 unexpected' in message
  assert key in message


@pytest.mark.parametrize('key', ['linear.weight', 'conv1.weight'])
def test_missing_entry_that_decides_an_option(weights, key):
  state = _akamaster()
  del state[key]
  message = _refusal(fitting.load, _save(weights, state), 'resnet20')
  assert f'1 missing ({key}), 0 unexpected, 0 of another shape' in message


def test_foreign_layout(weights):
  state = {f'blocks.{n}.running_mean': np.ones(3, np.float32) for n in (1, 2)}
  message = _refusal(fitting.load, _save(weights, state), 'resnet20')
  assert 'no layout known for resnet20 (blocks.1.running_mean' in message
  assert 'akamaster, pytorchcv, clusterq' in message


def test_no_batch_norm_statistics(weights):
  state = {k: v for k, v in _akamaster().items() if 'running' not in k}
  message = _refusal(fitting.load, _save(weights, state), 'resnet20')
  assert 'needs a teacher with BatchNorm statistics' in message
  assert 'supported networks are resnet8, ' in message


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
  state = _akamaster() | {key: np.ones((4, 16, 1, 1), np.float32)}
  message = _refusal(fitting.load, _save(weights, state), 'resnet20')
  assert f'squeeze-and-excitation ({key}) is not supported' in message
  assert 'supported networks are resnet8, ' in message


@pytest.mark.parametrize('name', ['resnet20', 'mobilenet_v2'])
def test_transposed_kernels(weights, name):
  if name == 'resnet20':
    state = _akamaster()
  else:
    layout = layouts.LAYOUTS[name][0]
    state = {
      layout.key(layer, leaf): np.ones(layout.to_source(shape), np.float32)
      for layer in matching.layers_of(
        registry.architecture(name), 3, num_classes=5
      )
      for leaf, shape in layer.shapes.items()
    }
  fitting.load(_save(weights, state), name)
  first = next(iter(state))
  flax = {
    k: v.transpose(2, 3, 1, 0) if v.ndim == 4 else v.T for k, v in state.items()
  }
  message = _refusal(fitting.load, _save(weights, flax), name)
  shape = list(flax[first].shape)
  assert f'kernels are transposed ({first} is {shape})' in message
  # Depthwise kernels of TensorFlow itself are [height, width, channels, 1].
  depthwise = {
    k: v.transpose(0, 1, 3, 2) if v.shape[2:3] == (1,) else v
    for k, v in flax.items()
  }
  message = _refusal(fitting.load, _save(weights, depthwise), name)
  assert 'kernels are transposed' in message


def test_negative_variance(weights):
  state = _akamaster()
  state['layer2.0.bn1.running_var'][[3, 5]] = -1e-3
  message = _refusal(fitting.load, _save(weights, state), 'resnet20')
  assert 'layer2.0.bn1.running_var has 2 negative variance(s) of 32' in message


def test_integer_weights(weights):
  state = _akamaster()
  state['conv1.weight'] = state['conv1.weight'].astype(np.int8)
  message = _refusal(fitting.load, _save(weights, state), 'resnet20')
  assert 'conv1.weight is int8' in message


# --- Files -------------------------------------------------------------------


def test_float_types_become_float32(weights):
  value = np.array([1.5, -2.25])
  kinds = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
  state = {f'k{n}': value.astype(kind) for n, kind in enumerate(kinds)}
  state['n'] = np.arange(3)
  tensors, metadata = files.read_tensors(_save(weights, state))
  assert metadata == {}
  assert tensors['n'].dtype == np.int64
  for n in range(len(kinds)):
    assert tensors[f'k{n}'].dtype == np.float32
    np.testing.assert_array_equal(tensors[f'k{n}'], value)


def test_float8_is_refused(weights):
  state = {'a': np.ones(2, ml_dtypes.float8_e4m3fn)}
  message = _refusal(files.read_tensors, _save(weights, state))
  assert 'tensor a has type F8_E4M3' in message


def test_module_prefix_and_counters(weights):
  one = np.ones(1, np.float32)
  state = {'module.a': one, 'module.b.num_batches_tracked': np.array(1)}
  assert list(files.read_tensors(_save(weights, state))[0]) == ['a']
  # A prefix of some keys only belongs to their names.
  state = {'module.a': one, 'a': one}
  tensors = files.read_tensors(_save(weights, state))[0]
  assert set(tensors) == {'module.a', 'a'}


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite(weights, bad):
  state = {'fine': np.ones(2), 'bad': np.array([bad, 1.0, bad])}
  message = _refusal(files.read_tensors, _save(weights, state))
  assert 'tensor bad has 2 NaN or infinite value(s) of 3' in message


def test_names_cannot_break_the_line(weights):
  state = {'a\nb\x1b[31m': np.array([np.nan])}
  message = _refusal(files.read_tensors, _save(weights, state))
  assert r'a\nb\x1b[31m' in message


@pytest.mark.parametrize(
  ('name', 'contents', 'found'),
  [
    ('absent.safetensors', None, 'No such file'),
    ('a.safetensors', b'', 'an empty file (0 bytes)'),
    ('a.pt', b'', 'an empty file (0 bytes)'),
    ('a.onnx', b'x', "extension '.onnx', expected .safetensors, .npz, .th"),
    ('weights', b'x', 'no extension'),
    ('a.safetensors', b'hello world', "start with b'hello wo' (11 bytes)"),
    ('a.safetensors', b'PK\3\4' + bytes(60), 'a zip of something else'),
    ('a.safetensors', b'version https://git-lfs.github.com', 'Git LFS'),
  ],
)
def test_not_a_weight_file(tmp_path, name, contents, found):
  path = tmp_path / name
  if contents is not None:
    path.write_bytes(contents)
  assert found in _refusal(files.read_tensors, path)


def test_folder_and_empty_safetensors(tmp_path, weights):
  assert 'Is a directory' in _refusal(files.read_tensors, tmp_path)
  message = _refusal(files.read_tensors, _save(weights, {}))
  assert 'no tensors' in message


@pytest.mark.parametrize('keep', [0.02, 0.5, 0.999])
def test_truncated_safetensors(weights, keep):
  _save(weights, _akamaster())
  whole = weights.read_bytes()
  weights.write_bytes(whole[: int(keep * len(whole))])
  message = _refusal(files.read_tensors, weights)
  assert 'truncated or damaged safetensors file' in message


def test_write_is_atomic_and_unflatten_undoes_it(weights, monkeypatch):
  # A transposed view: its buffer lies in another order than its elements.
  tree = {'a': {'b': {'c': np.arange(6.0, dtype=np.float32).reshape(2, 3).T}}}
  files.write_safetensors(weights, tree, {'k': 'v'})
  tensors, metadata = files.read_tensors(weights)
  assert list(tensors) == ['a/b/c']
  assert metadata == {'k': 'v'}
  read = files.unflatten(tensors)
  np.testing.assert_array_equal(read['a']['b']['c'], tree['a']['b']['c'])

  def no_space(*_):
    raise OSError(28, 'No space left on device')

  before = weights.read_bytes()
  monkeypatch.setattr(os, 'fsync', no_space)
  with pytest.raises(InputError, match='cannot be written: No space left'):
    files.write_safetensors(weights, {'other': np.ones(1)}, {})
  assert weights.read_bytes() == before
  assert os.listdir(weights.parent) == [weights.name]


def test_write_refusals(tmp_path):
  path = tmp_path / 'absent' / 'w.safetensors'
  message = _refusal(files.write_safetensors, path, {'a': np.ones(1)}, {})
  assert 'No such file or directory' in message
  with pytest.raises(ValueError, match="'a/b'"):
    files.write_safetensors(tmp_path / 'w', {'a/b': np.ones(1)}, {})


@pytest.mark.parametrize('keys', [('a', 'a/b'), ('a/b', 'a')])
def test_unflatten_refuses_a_tensor_that_is_a_group(keys):
  with pytest.raises(InputError, match='a'):
    files.unflatten(dict.fromkeys(keys, np.ones(1)))


# --- npz ---------------------------------------------------------------------


def test_npz_is_what_safetensors_is(tmp_path, weights):
  state = {f'module.{k}': v for k, v in _akamaster().items()}
  state['module.linear.weight'] = state['module.linear.weight'].astype(float)
  path = tmp_path / 'w.npz'
  np.savez(path, **state)
  ours = fitting.load(path, 'resnet20')
  theirs = fitting.load(_save(weights, state), 'resnet20')
  assert ours.report == theirs.report.replace(str(weights), str(path))
  for collection, layers in theirs.variables.items():
    for name, leaves in layers.items():
      for leaf, value in leaves.items():
        found = ours.variables[collection][name][leaf]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value)


def test_npz_that_would_fill_the_memory(tmp_path):
  path = tmp_path / 'a.npz'
  np.savez_compressed(path, a=np.zeros(2**28 + 1, np.uint8))
  assert 'bytes expand to 268,435,' in _refusal(files.read_tensors, path)


def test_unfit_npz(tmp_path):
  path = tmp_path / 'w.npz'
  for contents in (b'hello world', b'PK\3\4' + bytes(60)):
    path.write_bytes(contents)
    message = _refusal(files.read_tensors, path)
    assert 'cannot be read as an .npz of arrays' in message
  np.savez(path, a=np.ones(1), text=np.array(['b']))
  message = _refusal(files.read_tensors, path)
  assert 'tensor text has type <U1' in message
  target = tmp_path / 'created'
  np.savez(path, a=np.array([_Touch(target)], dtype=object))
  message = _refusal(files.read_tensors, path)
  assert 'cannot be read as an .npz of arrays' in message
  assert not target.exists()


# --- Torch files -------------------------------------------------------------


class _Touch:
  """Creates a file when unpickled: stands for any code."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_missing_torch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / 'a.th'
  path.write_bytes(b'PK')
  assert 'pip install torch' in _refusal(files.read_tensors, path)


@pytest.mark.torch
def test_unsafe_torch_versions(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.th'
  torch.save({'a': torch.ones(1)}, path)
  monkeypatch.setattr(torch, '__version__', '2.5.1+cpu')
  assert '2.6 or newer' in _refusal(files.read_tensors, path)


@pytest.mark.torch
@pytest.mark.parametrize('suffix', ['.th', '.pt', '.pth'])
@pytest.mark.parametrize('wrapper', ['state_dict', 'model', None])
@pytest.mark.parametrize('zipped', [True, False])
def test_torch_checkpoint(tmp_path, suffix, wrapper, zipped):
  torch = pytest.importorskip('torch')
  path = tmp_path / f'a{suffix}'
  state = {
    'module.conv1.weight': torch.ones(2).half(),
    'module.bn1.weight': torch.nn.Parameter(torch.ones(2).bfloat16()),
    'module.bn1.num_batches_tracked': torch.tensor(3),
  }
  torch.save(
    {wrapper: state, 'epoch': 3} if wrapper else state,
    path,
    _use_new_zipfile_serialization=zipped,
  )
  tensors, metadata = files.read_tensors(path)
  assert set(tensors) == {'conv1.weight', 'bn1.weight'}
  assert metadata == {}
  for value in tensors.values():
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, [1, 1])


@pytest.mark.torch
@pytest.mark.parametrize('kind', ['zip', 'legacy', 'pickle2', 'pickle5'])
def test_malicious_pickle_is_not_run(tmp_path, kind):
  torch = pytest.importorskip('torch')
  path, target = tmp_path / 'a.pt', tmp_path / 'created'
  data = {'a': torch.ones(1), 'b': _Touch(target)}
  if kind.startswith('pickle'):
    path.write_bytes(pickle.dumps(_Touch(target), int(kind[-1])))
  else:
    torch.save(data, path, _use_new_zipfile_serialization=kind == 'zip')
  message = _refusal(files.read_tensors, path)
  assert not target.exists()
  assert 'refused, nothing was run' in message
  assert 'mkdir' in message
  # The file is a live one: an unsafe read does run it.
  if kind.startswith('pickle'):
    pickle.loads(path.read_bytes())
  else:
    torch.load(path, weights_only=False)
  assert target.exists()


@pytest.mark.torch
def test_unsupported_objects_are_named(tmp_path):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.pt'
  torch.save(torch.nn.Linear(2, 2), path)
  message = _refusal(files.read_tensors, path)
  assert 'torch.nn.modules.linear.Linear' in message
  assert 'state_dict()' in message


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False])
def test_truncated_torch_file(tmp_path, zipped):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.pt'
  torch.save(
    {'a': torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped
  )
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  message = _refusal(files.read_tensors, path)
  assert 'truncated' in message
  assert 'zip' in message if zipped else 'pickle' in message
  assert 'expected a torch checkpoint' in message


@pytest.mark.torch
@pytest.mark.parametrize(
  ('contents', 'found'),
  [
    (b'hello world, no checkpoint', "start with b'hello wo'"),
    (b'<!DOCTYPE html><html></html>', 'a web page'),
    (b'\x89HDF\r\n\x1a\n', 'an HDF5 file'),
  ],
)
def test_foreign_contents_under_a_torch_name(tmp_path, contents, found):
  pytest.importorskip('torch')
  path = tmp_path / 'a.pt'
  path.write_bytes(contents)
  message = _refusal(files.read_tensors, path)
  assert found in message
  assert 'expected a torch checkpoint' in message


@pytest.mark.torch
def test_torch_files_that_hold_something_else(tmp_path):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.pt'
  torch.save([torch.ones(1)], path)
  assert 'found a list' in _refusal(files.read_tensors, path)
  torch.save({'w': torch.ones(1), 'epoch': 3, 4: torch.ones(1)}, path)
  message = _refusal(files.read_tensors, path)
  assert '2 entries are not tensors (epoch (int), 4 (Tensor))' in message
  torch.save({'w': torch.ones(2, 2).to_sparse()}, path)
  assert 'torch.sparse_coo' in _refusal(files.read_tensors, path)
  torch.save({'w': torch.ones(1).expand(2**40)}, path)
  assert 'expand to 4,398,046,511,104' in _refusal(files.read_tensors, path)
  torch.save({'w': torch.ones(2, device='meta')}, path)
  assert 'tensor w is' in _refusal(files.read_tensors, path)
