"""Float layers, and the moments that they record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.layers import fake_quant, float_layers, functions
from clusterq_jax.models import graph as graph_lib
from clusterq_jax.models import registry
from clusterq_jax.ops.moments import Moments
from clusterq_jax.quant import plan
from tests.reference import conv_variables, numpy_batch_norm, numpy_conv


@pytest.mark.parametrize(
  ('side', 'strides', 'padding', 'act'),
  [
    (3, 1, None, None),
    (3, 2, None, 'relu'),
    (1, 2, None, None),
    (3, 1, 0, None),
  ],
)
def test_float_conv_bn(image, side, strides, padding, act):
  layer = float_layers.ConvBN(6, side, strides, padding, act=act, taps=True)
  variables = conv_variables(side, 4, 6)
  y, state = layer.apply(variables, image, mutable=['moments'])
  pad = side // 2 if padding is None else padding
  h = numpy_conv(image, variables['params']['kernel'], strides, pad)
  expected = numpy_batch_norm(h, variables)
  expected = np.maximum(expected, 0) if act else expected
  np.testing.assert_allclose(y, expected, atol=1e-4)
  # The layer records the input of the BatchNorm.
  moments = state['moments']['input']
  assert isinstance(moments, Moments)
  np.testing.assert_allclose(moments.mean, h.mean((1, 2)), atol=1e-4)
  np.testing.assert_allclose(moments.var, h.var((1, 2)), rtol=1e-3, atol=1e-4)


def test_pretraining_moves_the_statistics(image):
  layer = float_layers.ConvBN(6, 3, train=True)
  variables = conv_variables(3, 4, 6)
  y, state = layer.apply(variables, image, mutable=['batch_stats'])
  h = numpy_conv(image, variables['params']['kernel'], 1, 1)
  batch = {'mean': h.mean((0, 1, 2)), 'var': h.var((0, 1, 2))}
  expected = numpy_batch_norm(h, {**variables, 'batch_stats': batch})
  np.testing.assert_allclose(y, expected, atol=1e-3)
  for key, new in batch.items():
    moved = 0.9 * variables['batch_stats'][key] + 0.1 * new
    np.testing.assert_allclose(state['batch_stats'][key], moved, rtol=1e-3)


@pytest.mark.parametrize(('channels', 'features'), [(2, 4), (3, 6), (1, 4)])
def test_pad_shortcut(channels, features):
  x = np.random.RandomState(0).randn(2, 5, 4, channels).astype(np.float32)
  y = np.asarray(functions.pad_channels(x, features, 2))
  assert y.shape == (2, 3, 2, features)
  before = (features - channels) // 2
  np.testing.assert_array_equal(
    y[..., before : before + channels], x[:, ::2, ::2]
  )
  assert np.count_nonzero(y) == x[:, ::2, ::2].size


@pytest.mark.parametrize(('kernel', 'strides'), [(2, 2), (3, 2), (4, 1)])
def test_avg_pool(image, kernel, strides):
  y = functions.avg_pool(image, kernel, strides)
  windows = np.lib.stride_tricks.sliding_window_view(
    np.float64(image), (kernel, kernel), (1, 2)
  )
  expected = windows[:, ::strides, ::strides].mean((-1, -2))
  np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize('quantized', [False, True])
def test_dense_flattens_as_torch(image, quantized):
  kernel = np.random.RandomState(0).randn(5 * 7 * 4, 3).astype(np.float32)
  layers = float_layers.layer_set()
  if quantized:
    layers = fake_quant.layer_set(plan.Plan((('last', 8),), (), False))
  params = {'kernel': kernel, 'bias': np.zeros(3, np.float32)}
  y = layers.dense(3, name='last').apply({'params': params}, image)
  expected = image.transpose(0, 3, 1, 2).reshape(3, -1) @ kernel
  np.testing.assert_allclose(y, expected, atol=0.5 if quantized else 1e-4)


def _forward_order(blocks, shortcut):
  """Lists the BatchNorm layers of He et al. 2015 in forward order."""
  names = ['stem']
  for stage in (1, 2, 3):
    for block in range(1, blocks + 1):
      name = f'stage{stage}_block{block}'
      names += [f'{name}_conv1', f'{name}_conv2']
      if shortcut == 'conv' and stage > 1 and block == 1:
        names.append(f'{name}_shortcut')
  return names


@pytest.mark.parametrize(
  ('arch', 'blocks', 'shortcut'),
  [
    ('resnet20', 3, 'conv'),
    ('resnet110', 18, 'pad'),
    ('resnet110', 18, 'conv'),
  ],
)
def test_moments_come_in_forward_order(arch, blocks, shortcut):
  build = registry.builder(arch, num_classes=10, shortcut=shortcut)
  graph = graph_lib.trace(build)
  names = _forward_order(blocks, shortcut)
  assert list(graph.batch_norms) == names
  assert list(graph.weighted) == [*names, 'classifier']
  moments = {n: {'input': jnp.full(1, i)} for i, n in enumerate(names)}
  moments = jax.tree.map(lambda a: a, moments)  # sorts keys, as Flax does
  assert blocks < 10 or list(moments) != names
  found = float_layers.ordered_moments({'moments': moments}, graph)
  np.testing.assert_array_equal(jnp.concatenate(found), np.arange(len(names)))
