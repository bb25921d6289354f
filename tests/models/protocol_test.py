"""The graph of a network, as tracing finds it."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from clusterq_jax.layers import float_layers
from clusterq_jax.models import graph as graph_lib
from clusterq_jax.models import protocol, registry
from clusterq_jax.models.node import Node


def test_graph_order_is_the_order_of_execution():
  build = registry.builder('resnet32', num_classes=10, shortcut='conv')
  called = []

  def interceptor(call, args, kwargs, context):
    if context.method_name == '__call__':
      called.append(context.module.name)
    return call(*args, **kwargs)

  network = build(float_layers.layer_set(tap=True))
  with nn.intercept_methods(interceptor):
    variables = jax.eval_shape(
      network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )
  graph = graph_lib.trace(build)
  layers = [name for name in called if name in variables['params']]
  assert layers == list(graph.weighted)
  assert set(graph.batch_norms) == set(variables['moments'])


def test_wiring_of_a_block():
  graph = graph_lib.trace(registry.builder('resnet20', num_classes=10))
  nodes = {node.name: node for node in graph.nodes}
  assert nodes['stage2_block1_add'] == Node(
    'stage2_block1_add',
    'add',
    ('stage2_block1_shortcut', 'stage2_block1_conv2'),
    'relu',
  )
  assert nodes['stage2_block1_shortcut'].op == 'pad_shortcut'
  consumers = {node.name for node in graph.consumers('stage1_block1_add')}
  assert consumers == {'stage1_block2_conv1', 'stage1_block2_add'}


def test_two_layers_of_one_name():
  class Twice(nn.Module):
    layers: protocol.LayerSet

    @nn.compact
    def __call__(self, x):
      x = self.layers.conv_bn(4, 3, name='conv')(x)
      return self.layers.conv_bn(4, 3, name='conv')(x)

  with pytest.raises(ValueError, match="two layers are called 'conv'"):
    graph_lib.trace(Twice)
