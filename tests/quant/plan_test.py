"""Places and bits of quantizers, and the size of the weights."""

import jax
import jax.numpy as jnp
import pytest

from clusterq_jax.layers import float_layers
from clusterq_jax.models import graph as graph_lib
from clusterq_jax.models import registry
from clusterq_jax.models.node import Node
from clusterq_jax.quant import plan

_STAGES = [(stage, block) for stage in (1, 2, 3) for block in (1, 2, 3)]

_BITS = {'weights': 3, 'activations': 5, 'first': 6, 'last': 7}


def _plan(placement, shortcut='pad'):
  build = registry.builder('resnet20', num_classes=10, shortcut=shortcut)
  bits = plan.Bits(**_BITS, placement=placement)
  return plan.make_plan(
    graph_lib.trace(build), bits, learned=True, input_limit=2.54
  )


def _paper_outputs():
  outputs = {'input': (8, True), 'stem': (5, False), 'pool': (8, False)}
  for stage, block in _STAGES:
    outputs[f'stage{stage}_block{block}_conv1'] = (5, False)
    outputs[f'stage{stage}_block{block}_add'] = (5, False)
  # The last add feeds only the pool.
  del outputs['stage3_block3_add']
  return outputs


def _found(decided):
  return {name: (o.bits, o.signed) for name, o in decided.outputs}


@pytest.mark.parametrize('shortcut', ['pad', 'conv'])
def test_paper_placement(shortcut):
  decided = _plan('paper', shortcut)
  assert _found(decided) == _paper_outputs()
  for unquantized in ('stage1_block1_conv2', 'stage3_block3_add', 'classifier'):
    assert decided.output(unquantized) is None
  assert decided.output('stem') == plan.Output(5, False)
  assert decided.output('input').step == pytest.approx(2.54 / 127)


@pytest.mark.parametrize('shortcut', ['pad', 'conv'])
def test_integer_placement(shortcut):
  expected = _paper_outputs()
  for stage, block in _STAGES:
    expected[f'stage{stage}_block{block}_conv2'] = (8, True)
  expected['stage3_block3_add'] = (8, False)
  if shortcut == 'conv':
    expected['stage2_block1_shortcut'] = (8, True)
    expected['stage3_block1_shortcut'] = (8, True)
  found = _found(_plan('integer', shortcut))
  assert found == expected
  # It feeds a convolution and, as a shortcut, an add: the narrow bits win.
  assert found['stage1_block1_add'] == (5, False)


@pytest.mark.parametrize(('shortcut', 'count'), [('pad', 20), ('conv', 22)])
def test_weight_bits(shortcut, count):
  decided = _plan('paper', shortcut)
  weights = dict(decided.weights)
  assert len(decided.weights) == len(weights) == count
  assert weights.pop('stem') == decided.weight_bits('stem') == 6
  assert weights.pop('classifier') == 7
  assert set(weights.values()) == {3}
  assert ('stage2_block1_shortcut' in weights) == (shortcut == 'conv')


def test_signs_follow_the_activation():
  nodes = (
    Node('image', 'input', ()),
    Node('linear', 'conv_bn', ('image',)),
    Node('pad', 'pad_shortcut', ('linear',)),
    Node('sum', 'add', ('pad', 'linear')),
    Node('windows', 'avg_pool', ('sum',)),
    Node('pool', 'global_avg_pool', ('windows',)),
    Node('logits', 'dense', ('pool',)),
  )
  bits = plan.Bits(4, 4, 4, 4, 'integer')
  assert _found(plan.make_plan(graph_lib.Graph(nodes), bits, False, 1.0)) == {
    'image': (8, True),
    'linear': (8, True),
    'sum': (8, True),
    'windows': (8, True),
    'pool': (8, True),
  }


def test_plans_are_static():
  assert _plan('paper') == _plan('paper')
  assert hash(_plan('paper')) == hash(_plan('paper'))
  assert _plan('paper') != _plan('integer')


def test_weight_bytes():
  build = registry.builder('resnet20', num_classes=10)
  network = build(float_layers.layer_set())
  params = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )['params']
  stem, classifier = 3 * 16 * 9, 64 * 10
  # He et al. count 269,722 parameters. Among them are 688 gains and 688 biases
  # of BatchNorms, and 10 biases of the classifier.
  others = 2 * 688 + 10
  body = 269_722 - stem - classifier - others
  bits = 6 * stem + 3 * body + 7 * classifier + 32 * others
  assert plan.weight_bytes(params, _plan('paper')) == bits / 8


def test_a_concat_quantizes_what_feeds_only_it():
  node = Node
  nodes = (
    node('image', 'input', ()),
    node('part', 'slice', ('image',), stop=2),
    node('a', 'conv_bn', ('image',), act='relu', features=4),
    node('b', 'conv', ('image',), features=4),
    node('moved', 'max_pool', ('b',)),
    node('inner', 'concat', ('a', 'moved')),  # two concats read it
    node('left', 'concat', ('inner', 'part')),
    node('right', 'concat', ('inner', 'left')),
    node('read', 'conv', ('right',), features=4),
    node('pool', 'global_avg_pool', ('read',)),
    node('logits', 'dense', ('pool',), features=2),
  )
  bits = plan.Bits(4, 4, 4, 4, 'integer')
  assert _found(plan.make_plan(graph_lib.Graph(nodes), bits, False, 1.0)) == {
    'image': (8, True),
    'inner': (8, True),
    'right': (4, True),
    'read': (8, True),
    'pool': (8, True),
  }
