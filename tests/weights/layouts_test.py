"""Layouts: the names and the axis order of every source."""

import numpy as np
import pytest

from clusterq_jax.weights import fitting, layouts
from tests.weights.states import akamaster, pytorchcv, save


def _check_real_resnet20(loaded):
  params, stats = loaded.variables['params'], loaded.variables['batch_stats']
  assert (loaded.in_channels, loaded.num_classes) == (3, 10)
  assert loaded.graph.node('stage2_block1_shortcut').op == 'pad_shortcut'
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
  state = akamaster(conv_shortcut=True)
  loaded = fitting.load(save(weights, state), 'resnet20')
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
  state = akamaster(5, 1, 7, conv_shortcut)
  ours = fitting.load(save(tmp_path / 'a.safetensors', state), 'resnet32')
  theirs = fitting.load(
    save(tmp_path / 'b.safetensors', pytorchcv(state)), 'resnet32'
  )
  assert (ours.layout, theirs.layout) == ('akamaster', 'pytorchcv')
  assert ours.graph == theirs.graph
  assert (ours.in_channels, ours.num_classes) == (1, 7)
  assert ours.graph.node('stage2_block1_shortcut').op == (
    'conv_bn' if conv_shortcut else 'pad_shortcut'
  )
  for collection, layers in ours.variables.items():
    assert theirs.variables[collection].keys() == layers.keys()
    for name, leaves in layers.items():
      for leaf, value in leaves.items():
        np.testing.assert_array_equal(
          theirs.variables[collection][name][leaf], value
        )
