"""Graphs as JSON: what is written comes back, and what is wrong is refused."""

import json

import pytest

from clusterq_jax.errors import InputError
from clusterq_jax.models import graph_file, registry
from clusterq_jax.models.graph import Graph, trace
from clusterq_jax.models.node import Node

_EVERY_OP = Graph(
  (
    Node('input', 'input', ()),
    Node('c1', 'conv_bn', ('input',), 'relu6', 8, (3, 3), 2, epsilon=1e-3),
    Node(
      'c2', 'conv', ('c1',), None, 8, (1, 3), padding=((0, 0), (1, 1)), groups=2
    ),
    Node('swish', 'act', ('c2',), 'hard_swish'),
    Node('leaky', 'act', ('c1',), 'leaky_relu', slope=0.1),
    Node('both', 'concat', ('swish', 'leaky')),
    Node('mixed', 'shuffle', ('both',), groups=2),
    Node('half', 'slice', ('mixed',), start=8, stop=16),
    Node('padded', 'pad', ('half',), padding=((1, 0), (0, 1))),
    Node('largest', 'max_pool', ('padded',), kernel=(2, 2), padding=0),
    Node(
      'mean',
      'avg_pool',
      ('largest',),
      kernel=(3, 3),
      padding=1,
      count_padding=True,
    ),
    Node('pool', 'global_avg_pool', ('mean',)),
    Node('gate', 'act', ('pool',), 'sigmoid'),
    Node('gated', 'mul', ('mean', 'gate')),
    Node('short', 'pad_shortcut', ('gated',), features=10, strides=2),
    Node('large', 'resize', ('short',), factor=2),
    Node('wide', 'conv_bn', ('large',), features=10, dilation=2),
    Node('sum', 'add', ('wide', 'large'), 'relu'),
    Node('logits', 'dense', ('sum',), features=5),
  ),
  (12, 10, 3),
)


def test_every_op_comes_back():
  assert graph_file.from_json(graph_file.to_json(_EVERY_OP)) == _EVERY_OP


def test_traced_graphs_come_back():
  for arch in registry.names():
    graph = trace(registry.builder(arch, num_classes=10))
    assert graph_file.from_json(graph_file.to_json(graph)) == graph


def _changed(change):
  raw = json.loads(graph_file.to_json(_EVERY_OP))
  change(raw, {node['name']: node for node in raw['nodes']})
  return json.dumps(raw)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda g, n: g.update(version=2), "version '2', expected 1"),
    (lambda g, n: g.update(nodes=[]), '0 nodes, expected 2'),
    (lambda g, n: g.update(image_shape=[12, 10]), 'image_shape='),
    (lambda g, n: n['c1'].update(op='exec'), "op 'exec'"),
    (lambda g, n: n['c1'].update(inputs=['wide']), 'before it'),
    (lambda g, n: n['c1'].update(inputs=[]), '0 inputs'),
    (lambda g, n: n['c1'].update(name='c'), "reads 'c1'"),
    (lambda g, n: n['c2'].update(name='c1'), 'another name'),
    (lambda g, n: n['c2'].update(name='apply'), 'another name'),
    (lambda g, n: n['c2'].update(name='a/b'), 'a node is called'),
    (lambda g, n: n['c1'].update(features=0), 'features='),
    (lambda g, n: n['c1'].update(features=2**40), 'features='),
    (lambda g, n: n['c1'].update(features=True), 'features='),
    (lambda g, n: n['c1'].pop('features'), 'no features'),
    (lambda g, n: n['c1'].update(act='gelu'), 'act='),
    (lambda g, n: n['c1'].update(kernel=[3]), 'kernel='),
    (lambda g, n: n['c1'].update(kernel=[300, 300], padding=0), 'does not fit'),
    (lambda g, n: n['c1'].update(padding=[[1, 2], [3]]), 'padding='),
    (lambda g, n: n['c1'].update(epsilon=float('nan')), 'epsilon='),
    (lambda g, n: n['c1'].update(epsilon=0.0), 'epsilon='),
    (
      lambda g, n: n['c1'].update(padding=2**20, strides=2**20),
      'pads to',
    ),
    (lambda g, n: n['c2'].update(groups=3), 'groups do not divide'),
    (lambda g, n: n['half'].update(stop=17), 'channels 8 to 17'),
    (lambda g, n: n['swish'].update(groups=2), "field 'groups'"),
    (lambda g, n: n['sum'].update(inputs=['wide', 'c1']), 'do not fit'),
    (lambda g, n: n['large'].update(factor=2**20), 'an output of'),
    (lambda g, n: n['logits'].update(op='conv'), 'dense nodes (none)'),
    (lambda g, n: n['sum'].update(inputs=['wide', 'wide']), None),
    (lambda g, n: n['leaky'].update(inputs=['input']), 'different sizes'),
    (
      lambda g, n: n['both'].update(inputs=['swish'] * 2),
      'nothing reads leaky',
    ),
    (lambda g, n: g['nodes'].append(3), "a node is '3'"),
  ],
)
def test_faults_are_refused_in_one_line(change, message):
  text = _changed(change)
  if message is None:
    graph_file.from_json(text)
    return
  with pytest.raises(InputError) as caught:
    graph_file.from_json(text)
  assert message in str(caught.value)
  assert str(caught.value).startswith('graph: ')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text', ['', '[' * 10**5, '{"version":', 'null', '7'])
def test_no_json(text):
  with pytest.raises(InputError, match='graph: '):
    graph_file.from_json(text)


def test_shapes_of_every_op():
  shapes = _EVERY_OP.shapes()
  assert shapes['c1'] == (6, 5, 8)
  assert shapes['padded'] == (7, 6, 8)
  assert shapes['gate'] == (1, 1, 8)
  assert shapes['large'] == (6, 6, 10)
  assert shapes['logits'] == (1, 1, 5)
  variables = _EVERY_OP.variable_shapes()
  assert variables['params']['c2']['kernel'] == (1, 3, 4, 8)
  assert variables['params']['logits']['kernel'] == (360, 5)
