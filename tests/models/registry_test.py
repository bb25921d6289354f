"""Networks that a user registers: weights, refusals, names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from clusterq_jax import config as config_lib
from clusterq_jax import weights
from clusterq_jax.deploy import student
from clusterq_jax.errors import InputError
from clusterq_jax.layers import fake_quant
from clusterq_jax.models import protocol, registry
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import plan
from clusterq_jax.weights import teacher

_EXPECTS = Preprocessing(image_size=(8, 6), mean=(0.5,), std=(0.25,))
_ROWS = {
  'first': ('a.conv', 'a.bn'),
  'side': ('blocks.{m}.{i}.conv', 'blocks.{m}.{i}.bn'),
  'last': ('out', 'out'),
}


class _Net(nn.Module):
  """Names of its own for the first and the last layer."""

  layers: protocol.LayerSet
  num_classes: int
  width: int = 4
  act: str | None = 'relu'

  @nn.compact
  def __call__(self, x):
    layers = self.layers
    x = layers.input(name='input')(x)
    x = layers.conv_bn(self.width, 3, act=self.act, name='first')(x)
    y = layers.conv_bn(self.width, 1, name='stage1_block1_side')(x)
    x = layers.add(name='stage1_block1_add')(x, y)
    x = layers.avg_pool(kernel=3, strides=3, name='pool')(x)
    return layers.dense(self.num_classes, name='last')(x)


class _Wider(_Net):
  width: int = 6


class _Signed(_Net):
  act: str | None = None


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
  """What a test registers is gone after it."""
  known = dict(registry._ARCHITECTURES)
  monkeypatch.setattr(registry, '_ARCHITECTURES', known)


def _save(path, width=4, classes=3, **changes):
  random = np.random.RandomState(0)
  state = {
    'a.conv.weight': random.randn(width, 1, 3, 3),
    'blocks.0.0.conv.weight': random.randn(width, width, 1, 1),
    'out.weight': random.randn(classes, 4 * width),
    'out.bias': random.randn(classes),
  }
  for bn in ('a.bn', 'blocks.0.0.bn'):
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      state[f'{bn}.{leaf}'] = random.rand(width)
  state |= changes
  tensors = {k: np.float32(v) for k, v in state.items() if v is not None}
  safetensors.numpy.save_file(tensors, path)
  return str(path)


@pytest.fixture
def file(tmp_path):
  return tmp_path / 'w.safetensors'


def _register(network=_Net, rows=_ROWS):
  registry.register('net', network, rows, _EXPECTS)


def _refused(*args, **options):
  with pytest.raises(InputError) as caught:
    teacher.load('net', *args, **options)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_registered_network_loads(file):
  _register()
  loaded = teacher.load('net', _save(file))
  assert loaded.preprocessing == _EXPECTS
  assert loaded.num_classes == 3
  assert loaded.graph.weighted == ('first', 'stage1_block1_side', 'last')
  kernel = weights.read_tensors(file)[0]['out.weight']
  found = loaded.variables['params']['last']['kernel']
  np.testing.assert_array_equal(found, kernel.T)
  changed = teacher.load('net', str(file), mean=(0.25,))
  assert changed.preprocessing.mean == (0.25,)


def test_an_unknown_name_comes_with_the_way_out():
  with pytest.raises(InputError) as caught:
    registry.architecture('resnet19')
  message = str(caught.value)
  assert 'did you mean resnet' in message
  assert 'convert it, see docs/networks.md' in message


def test_config_knows_what_is_registered():
  config = config_lib.default_config()
  config.teacher.arch = 'net'
  with pytest.raises(
    InputError, match=r"config\.teacher\.arch.*'net'.*import first the file"
  ):
    config_lib.resolve(config)
  _register()
  config_lib.resolve(config)


def test_the_newest_registration_counts(file):
  _register()
  teacher.load('net', _save(file))
  _register(_Wider)
  assert 'does not fit net' in _refused(_save(file))
  loaded = teacher.load('net', _save(file, width=6))
  assert loaded.variables['params']['first']['kernel'].shape[-1] == 6


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'out.bias': None}, '1 missing (out.bias)'),
    ({'blocks.0.1.conv.weight': np.ones(3)}, '1 unexpected (blocks.0.1.conv'),
    ({'a.conv.weight': np.ones((4, 1, 5, 5))}, 'expected [4, 1, 3, 3]'),
    ({'out.weight': np.ones((3, 4))}, 'out.weight is [3, 4], expected [3, 16]'),
  ],
)
def test_weights_that_do_not_fit(file, changes, expected):
  _register()
  message = _refused(_save(file, **changes))
  assert f'{file} does not fit net: ' in message
  assert expected in message


def test_class_count(file):
  _register()
  message = _refused(_save(file), num_classes=10)
  assert 'has 3 classes; config.teacher.num_classes=10' in message


def test_weights_of_another_source(file):
  _register()
  state = {'x.running_mean': np.ones(3, np.float32)}
  safetensors.numpy.save_file(state, file)
  message = _refused(str(file))
  assert 'found tensors of no layout known for net (x.running_mean)' in message


@pytest.mark.parametrize(('size', 'features'), [((9, 9), 36), ((2, 8), 0)])
def test_another_image_size(file, size, features):
  _register()
  assert teacher.load('net', _save(file), image_size=(6, 7))
  assert _refused(str(file), image_size=size) == (
    f'teacher.image_size={size}: gives last {features} features; its weights '
    'take 16'
  )


@pytest.mark.parametrize(
  'rows',
  [
    {k: v for k, v in _ROWS.items() if k != 'side'},
    _ROWS | {'side': ('{x}.conv', '{x}.bn')},
  ],
)
def test_bad_rows(file, rows):
  _register(rows=rows)
  message = _refused(_save(file))
  assert "net: the layer 'stage1_block1_side' has no row, or one" in message
  assert 'expected s, r, b, i, n, m' in message


def test_names_of_the_project_are_taken():
  with pytest.raises(InputError, match="'resnet20' comes with the project"):
    registry.register('resnet20', _Net, _ROWS, _EXPECTS)


def test_student_of_an_unknown_network(tmp_path):
  path = tmp_path / 'student.safetensors'
  metadata = {
    'format': 'clusterq-jax student 1',  # before files had graphs
    'arch': 'net',
    'options': '{"num_classes": 3}',
    'preprocessing': '{"image_size": [8, 6], "mean": [0.5], "std": [0.25]}',
  }
  weights.write_safetensors(path, {'a': np.ones(1)}, metadata)
  with pytest.raises(InputError) as caught:
    student.load(tmp_path)
  message = str(caught.value)
  assert message.startswith(f"{path}: no network 'net' is known; ")
  assert message.endswith('import first the file that registers it')


@pytest.mark.parametrize(
  ('found', 'loaded'), [(5, 5), (None, 8), (2.5, None), (16, None), (-1, None)]
)
def test_zero_point_of_a_student(file, tmp_path, found, loaded):
  """What the file says; the middle in files from before zero points."""
  _register(_Signed)
  source = teacher.load('net', _save(file))
  bits = plan.Bits(4, 4, 4, 4, 'paper')
  decided = plan.make_plan(source.graph, bits, True, 2.0)
  network = source.build(fake_quant.layer_set(decided))
  x = jnp.ones((1, 8, 6, 1))
  apply = jax.jit(functools.partial(network.apply, mutable=['quant']))
  _, quant = apply(source.variables, x)
  variables = {**source.variables, **quant}
  variables['quant']['first'].pop('zero_point')
  if found is not None:
    variables['quant']['first']['zero_point'] = np.float32(found)
  path = tmp_path / 'student.safetensors'
  student.save(
    path, variables, source.graph, bits, True, source.preprocessing, ()
  )
  if loaded is None:
    with pytest.raises(InputError) as caught:
      student.load(path)
    assert str(caught.value) == (
      f'{path}: quant.first.zero_point={float(found)}; expected an integer '
      'from 0 to 15'
    )
  else:
    registry._ARCHITECTURES.pop('net')  # the file carries its network
    quant = student.load(path).variables['quant']
    assert quant['first']['zero_point'] == loaded
