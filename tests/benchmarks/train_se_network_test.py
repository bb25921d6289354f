"""The trained network with squeeze-excite: as a program, and as a class."""

import pathlib

import numpy as np
import pytest

from clusterq_jax import data, importing

_PROGRAM = pathlib.Path(__file__).parents[1] / 'assets' / 'se_network.pt2'


@pytest.fixture(scope='module')
def images():
  """500 test images, and their labels."""
  test = data.read_fashion_mnist(data.ASSETS, 't10k')
  return data.Images(*(array[:500] for array in test))


@pytest.fixture(scope='module')
def answers(images):
  """The logits of the imported network."""
  imported = importing.import_program(_PROGRAM)
  ops = {node.act or node.op for node in imported.graph.nodes}
  assert {'hard_swish', 'hard_sigmoid', 'mul', 'add', 'relu'} <= ops
  mean, std = 0.2861, 0.353
  x = (images.images / np.float32(255) - np.float32(mean)) / np.float32(std)
  return importing.logits(imported, x)


def test_the_program_is_small():
  assert _PROGRAM.stat().st_size < 500_000


def test_it_was_trained(images, answers):
  assert np.mean(answers.argmax(-1) == images.labels) > 0.88


@pytest.mark.torch
def test_the_class_gives_the_same(images, answers):
  torch = pytest.importorskip('torch')
  from benchmarks import train_se_network

  network = train_se_network.SENetwork().eval()
  network.load_state_dict(torch.export.load(_PROGRAM).state_dict)
  with torch.no_grad():
    expected = network(train_se_network.normalized(images.images)).numpy()
  difference = np.abs(answers - expected).max() / np.abs(expected).max()
  assert difference < 1e-5
