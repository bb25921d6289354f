"""Golden programs of torch.export give torch's logits, without torch."""

import json
import pathlib

import numpy as np
import pytest

from clusterq_jax import importing
from clusterq_jax.importing import pt2_files

_FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'programs'
_LOGITS = json.loads((_FOLDER / 'logits.json').read_text())
_RELEASES = ('2.7', '2.8', '2.9', '2.13')


def _images(shape):
  """As in golden/make_programs.py."""
  return np.random.RandomState(0).randn(2, *shape).astype(np.float32)


def _imported(name):
  return importing.import_program(_FOLDER / f'{name}.pt2')


def _difference(name, imported):
  expected = np.array(_LOGITS[name]['logits'])
  given = importing.logits(imported, _images(_LOGITS[name]['shape']))
  return importing.difference(given, expected)


@pytest.mark.parametrize('name', sorted(_LOGITS))
def test_the_logits_are_those_of_torch(name):
  assert _difference(name, _imported(name)) < 2e-5


def test_the_networks_use_every_op():
  found = {
    kind
    for name in _LOGITS
    for node in _imported(name).graph.nodes
    for kind in (node.op, node.act)
  }
  assert found >= {
    *('conv_bn', 'conv', 'dense', 'act', 'add', 'mul', 'concat', 'slice'),
    *('shuffle', 'max_pool', 'avg_pool', 'global_avg_pool'),
    *('relu', 'sigmoid', 'hard_swish', 'hard_sigmoid'),
  }


@pytest.mark.parametrize('release', _RELEASES[:-1])
def test_releases_give_the_same_graph(release):
  graph = _imported(f'release_{release}').graph
  assert graph == _imported(f'release_{_RELEASES[-1]}').graph


def test_names_are_those_of_the_modules():
  names = [node.name for node in _imported('release_2.13').graph.nodes]
  assert [*names[:4], names[-1]] == ['input', 'conv1', 'relu', 'add', 'fc']
  regnety = {node.name for node in _imported('regnety').graph.nodes}
  assert {'stem.conv', 's1.b1.conv2.conv', 's1.b1.se.fc1', 'head.fc'} <= regnety


def test_normalisation_of_the_program_moves_to_mean_and_std():
  imported = _imported('inception')
  assert imported.graph.nodes[1].name == 'stem.0'
  mean, std = imported.normalization(
    (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  )
  np.testing.assert_allclose(mean, 0.5, rtol=1e-6)
  np.testing.assert_allclose(std, 0.5, rtol=1e-6)


@pytest.mark.parametrize('name', ['densenet', 'preresnet', 'vgg_bn'])
def test_every_batch_norm_is_kept(name):
  program = pt2_files.read(_FOLDER / f'{name}.pt2')
  kept = [key for key in program.tensors if key.endswith('running_var')]
  graph = _imported(name).graph
  assert len(graph.batch_norms) == len(kept)
  # Those of DenseNet and PreResNet that stand before a convolution are alone.
  alone = [node for node in graph.nodes if node.scales]
  assert bool(alone) == (name != 'vgg_bn')
  assert all(node.op == 'conv_bn' for node in alone)


def test_variables_are_finite_float32():
  imported = _imported('mobilenet_v3')
  for group in imported.variables.values():
    for leaves in group.values():
      for array in leaves.values():
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
