"""Teacher files that carry their graph."""

import json

import numpy as np
import pytest
import safetensors.numpy

from clusterq_jax import weights
from clusterq_jax.errors import InputError
from clusterq_jax.models import graph_file
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.node import Node
from clusterq_jax.weights import files, graph_weights, teacher

_NODES = (
  Node('input', 'input', ()),
  Node('stem.conv', 'conv_bn', ('input',), 'relu', 4, (3, 3), 2),
  Node('squeeze', 'global_avg_pool', ('stem.conv',)),
  Node('fc1', 'conv', ('squeeze',), features=4),
  Node('gate', 'act', ('fc1',), 'prelu'),
  Node('gated', 'mul', ('stem.conv', 'gate')),
  Node('pool', 'global_avg_pool', ('gated',)),
  Node('fc', 'dense', ('pool',), features=3),
)
_INPUT = {
  'image_size': (8, 6),
  'mean': (0.5, 0.4, 0.3, 0.2),
  'std': (0.5, 0.5, 0.5, 0.5),
}


def _variables(graph):
  random = np.random.default_rng(0)
  shapes = graph.variable_shapes((8, 6, 4))
  return {
    collection: {
      layer: {
        leaf: random.uniform(0.5, 1, shape).astype(np.float32)
        for leaf, shape in leaves.items()
      }
      for layer, leaves in layers.items()
    }
    for collection, layers in shapes.items()
  }


@pytest.fixture(params=[(8, 6, 4), None], ids=['frozen', 'any size'])
def path(request, tmp_path):
  path = tmp_path / 'teacher.safetensors'
  graph = Graph(_NODES, request.param)
  weights.save(path, graph, _variables(graph), {**_INPUT, 'crop': 0.5})
  return path


def test_an_architecture_that_is_not_used_is_named(path):
  loaded = weights.load(path, 'resnet18')
  assert loaded.graph.nodes == _NODES
  (note,) = loaded.notes
  assert 'config.teacher.arch=resnet18 is not used' in note


def test_comes_back_without_a_name(path):
  assert weights.load(path, '').notes == ()
  loaded = teacher.load('', str(path))
  assert loaded.graph.nodes == _NODES
  assert loaded.preprocessing.image_size == (8, 6)
  assert loaded.num_classes == 3
  assert loaded.resize == 12
  for layers in _variables(loaded.graph).values():
    assert layers.keys() <= {name for name in loaded.graph.weighted} | {'gate'}
  expected = _variables(loaded.graph)['params']['fc1']['kernel']
  found = loaded.variables['params']['fc1']['kernel']
  np.testing.assert_array_equal(found, expected)


def test_frozen_size(path):
  if json.loads(files.read_tensors(path)[1]['graph'])['image_shape']:
    with pytest.raises(InputError, match=r'was exported for \(8, 6\)'):
      teacher.load('', str(path), image_size=(8, 8))
  else:
    assert teacher.load('', str(path), image_size=(8, 8))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t, m: t.pop('params/fc1/bias'), 'missing: params/fc1/bias'),
    (lambda t, m: t.update({'params/x/y': t['params/fc/bias']}), 'left over'),
    (lambda t, m: t.update({'params/fc/bias': np.ones(4)}), 'expects [3]'),
    (
      lambda t, m: t['batch_stats/stem.conv/var'].fill(-1),
      'negative variances',
    ),
    (lambda t, m: t['params/fc/bias'].fill(np.inf), 'NaN or infinite'),
    (lambda t, m: m.update(graph='{}'), 'graph: has version'),
    (lambda t, m: m.update(graph=m['graph'].replace('conv_bn', 'x')), "op 'x'"),
    (lambda t, m: m.update(format='other'), "format is 'other'"),
    (lambda t, m: m.update(crop='2'), 'crop=2'),
    (lambda t, m: m.update(image_size='[1, 8000]'), 'image_size'),
  ],
)
def test_faults_are_refused(tmp_path, change, message):
  path = tmp_path / 'teacher.safetensors'
  graph = Graph(_NODES, (8, 6, 4))
  weights.save(path, graph, _variables(graph), _INPUT)
  tensors, metadata = files.read_tensors(path)
  change(tensors, metadata)
  safetensors.numpy.save_file(tensors, path, metadata)
  with pytest.raises(InputError) as caught:
    teacher.load('', str(path))
  assert message in str(caught.value)
  assert str(path) in str(caught.value) or 'image_size' in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('key', ['params', 'params/stem.conv'])
def test_a_tensor_in_the_place_of_a_group_is_refused(tmp_path, key):
  path = tmp_path / 'teacher.safetensors'
  weights.save(path, Graph(_NODES), _variables(Graph(_NODES)), _INPUT)
  _, metadata = files.read_tensors(path)
  safetensors.numpy.save_file({key: np.ones(1)}, path, metadata)
  with pytest.raises(InputError, match='no convolution of the input'):
    teacher.load('', str(path))


def test_a_state_dict_needs_a_name(tmp_path):
  path = tmp_path / 'state.safetensors'
  safetensors.numpy.save_file({'conv.weight': np.ones((1, 1))}, path)
  with pytest.raises(InputError, match='carries no graph of its network'):
    teacher.load('', str(path))


def test_a_graph_that_takes_any_size_is_checked_at_its_size(tmp_path):
  path = tmp_path / 'teacher.safetensors'
  nodes = (*_NODES[:2], Node('fc', 'dense', ('stem.conv',), features=3))
  graph = Graph(nodes)
  weights.save(path, graph, _variables(graph), _INPUT)
  assert graph_file.from_json(files.read_tensors(path)[1]['graph']) == graph
  assert teacher.load('', str(path))
  with pytest.raises(InputError, match='gives fc 64 features; its weights ta'):
    teacher.load('', str(path), image_size=(8, 8))
  assert graph_weights.load(str(path), *files.read_tensors(path)).num_classes
