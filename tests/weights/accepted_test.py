"""Inputs that must load: a table. No change may take one away.

Every layout of every family, wrappers of state dicts, folders and tables of
images, and every shipped config. What is refused is tested elsewhere.
"""

import pathlib
import runpy

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from clusterq_jax import config as config_lib
from clusterq_jax import data
from clusterq_jax.models import registry
from clusterq_jax.weights import fitting, layouts, matching

_ROOT = pathlib.Path(__file__).parents[2]
_NETWORKS = {
  'cifar_resnet': ('resnet8', {}),
  'resnet': ('resnet18', {}),
  'mobilenet_v2': ('mobilenet_v2', {}),
  'efficientnet_lite': ('efficientnet_lite0', {}),
}
_LAYOUTS = [
  pytest.param(*_NETWORKS[family], layout, id=f'{family}-{layout.name}')
  for family, known in layouts.LAYOUTS.items()
  for layout in known
]


def _state(arch, options, layout, channels=3, classes=4):
  """Random tensors under the names that a layout gives them."""
  layers = matching.layers_of(
    registry.architecture(arch),
    channels,
    num_classes=classes,
    **options,
    **layout.options.get(arch, {}),
  )
  random = np.random.RandomState(0)
  state = {}
  for layer in layers:
    for leaf, shape in layer.shapes.items():
      value = random.rand(*layout.to_source(shape)).astype(np.float32)
      state[layout.key(layer, leaf)] = value
  return state


def _check(loaded, state):
  leaves = [
    leaf
    for layers in loaded.variables.values()
    for layer in layers.values()
    for leaf in layer.values()
  ]
  assert len(leaves) == len(state)
  assert sum(float(leaf.sum()) for leaf in leaves) == pytest.approx(
    sum(float(value.sum()) for value in state.values()), rel=1e-4
  )


# --- Weights -----------------------------------------------------------------


@pytest.mark.parametrize(('arch', 'options', 'layout'), _LAYOUTS)
def test_layout(tmp_path, arch, options, layout):
  state = _state(arch, options, layout)
  metadata = None
  if not layout.torch_order:
    metadata = {'format': fitting.FORMAT, 'arch': arch}
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(state, path, metadata)
  _check(fitting.load(path, arch), state)


_AKAMASTER = layouts.LAYOUTS['cifar_resnet'][0]


def _counters(state):
  extra = {
    key.replace('running_var', 'num_batches_tracked'): np.array(3)
    for key in state
    if key.endswith('running_var')
  }
  return {**state, **extra}


def _module(state):
  return {f'module.{key}': value for key, value in state.items()}


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('change', [dict, _counters, _module])
@pytest.mark.parametrize('suffix', ['.safetensors', '.npz'])
def test_keys(tmp_path, suffix, change, channels):
  state = _state('resnet8', {}, _AKAMASTER, channels)
  path = tmp_path / f'weights{suffix}'
  if suffix == '.npz':
    np.savez(path, **change(state))
  else:
    safetensors.numpy.save_file(change(state), path)
  _check(fitting.load(path, 'resnet8'), state)


@pytest.mark.torch
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64'])
@pytest.mark.parametrize('change', [dict, _counters, _module])
@pytest.mark.parametrize(
  'wrap',
  [
    lambda state: state,
    lambda state: {'state_dict': state, 'best_prec1': 91.0, 'epoch': 3},
    lambda state: {'model': state, 'optimizer': {'lr': 0.1}},
  ],
  ids=['bare', 'state_dict', 'model'],
)
@pytest.mark.parametrize('suffix', ['.th', '.pt', '.pth'])
def test_torch_file(tmp_path, suffix, wrap, change, dtype):
  torch = pytest.importorskip('torch')
  state = _state('resnet8', {}, _AKAMASTER)
  tensors = {
    key: torch.tensor(value).to(
      getattr(torch, dtype if value.dtype == np.float32 else 'int64')
    )
    for key, value in change(state).items()
  }
  path = tmp_path / f'weights{suffix}'
  torch.save(wrap(tensors), path)
  _check(fitting.load(path, 'resnet8'), state)


# --- Images ------------------------------------------------------------------


def _pixels(label):
  return np.full((8, 8, 3), 20 * label + 10, np.uint8)


def _picture(path, label):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(_pixels(label)).save(path)


def _class_folders(folder):
  for label, name in enumerate(('ant', 'bee', 'cat')):
    _picture(folder / name / 'a.png', label)
  (folder / 'bee' / 'notes.txt').write_text('no image')
  (folder / 'readme.txt').write_text('no image')


def _table(folder, images='images', head='file,label\n', end='\n'):
  lines = [f'{label}.png,{label}' for label in range(3)]
  for label in range(3):
    _picture(folder / images / f'{label}.png', label)
  text = head + end.join(lines) + end
  (folder / 'labels.csv').write_bytes(text.encode())


_FOLDERS = {
  'class folders': _class_folders,
  'csv': _table,
  'csv beside the images': lambda folder: _table(folder, '.'),
  'csv with carriage returns': lambda folder: _table(folder, end='\r\n'),
  'csv without a last line end': lambda folder: (
    _table(folder),
    (folder / 'labels.csv').write_text('file,label\n0.png,0\n1.png,1\n2.png,2'),
  ),
  'csv with a third column': lambda folder: (
    _table(folder),
    (folder / 'labels.csv').write_text(
      'file,comment,label\n0.png,x,0\n1.png,,1\n2.png,"a,b",2\n'
    ),
  ),
}


@pytest.mark.parametrize('make', _FOLDERS.values(), ids=_FOLDERS)
def test_folder(tmp_path, make):
  make(tmp_path)
  found = data.load('folder', str(tmp_path), (8, 8, 3), 3)
  assert found.labels.tolist() == [0, 1, 2]
  np.testing.assert_array_equal(
    found.images[:3], [_pixels(label) for label in range(3)]
  )
  assert not found.images.broken


@pytest.mark.parametrize('suffix', ['bmp', 'gif', 'png', 'ppm', 'tiff', 'webp'])
def test_file_format(tmp_path, suffix):
  path = tmp_path / 'ant' / f'a.{suffix}'
  path.parent.mkdir()
  Image.fromarray(_pixels(1)).save(
    path, **({'lossless': True} if suffix == 'webp' else {})
  )
  found = data.load('folder', str(tmp_path), (8, 8, 3), 1)
  np.testing.assert_array_equal(found.images[:1], [_pixels(1)])


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_picture_mode(tmp_path, mode):
  path = tmp_path / 'ant' / ('a.tiff' if mode == 'CMYK' else 'a.png')
  path.parent.mkdir()
  image = Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).convert(mode)
  image.save(path)
  found = data.load('folder', str(tmp_path), (8, 8, 3), 1)
  np.testing.assert_array_equal(found.images[:1], np.full((1, 8, 8, 3), 255))


@pytest.mark.parametrize('kind', [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz(tmp_path, save, kind):
  images = np.stack([_pixels(label) for label in range(3)])
  save(tmp_path / 'a.npz', images=images, labels=np.arange(3, dtype=kind))
  found = data.load('npz', str(tmp_path / 'a.npz'), (8, 8, 3), 3)
  assert found.labels.tolist() == [0, 1, 2]


# --- Configs -----------------------------------------------------------------


@pytest.mark.parametrize(
  'name', [path.stem for path in sorted((_ROOT / 'configs').glob('*.py'))]
)
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_config(name, bits):
  config = runpy.run_path(str(_ROOT / 'configs' / f'{name}.py'))['get_config']()
  config.quant.weight_bits = config.quant.activation_bits = bits
  config_lib.resolve(config)
