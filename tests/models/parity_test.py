"""Every architecture and layout gives torch's logits."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from clusterq_jax import weights
from clusterq_jax.layers import float_layers
from clusterq_jax.models.network import Network

_MAKE = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'make.py'
_SPEC = importlib.util.spec_from_file_location('golden', _MAKE)
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)

# Compiled in about 2 s each.
_QUICK = 'pytorchcv_resnet20', 'torchvision_resnet18'

pytestmark = pytest.mark.usefixtures('optimized')


def _logits(path, name, tensors):
  arch, _ = golden.CASES[name]
  safetensors.numpy.save_file(tensors, path)
  loaded = weights.load(path, arch)
  apply = jax.jit(Network(float_layers.layer_set(), loaded.graph).apply)
  return np.asarray(apply(loaded.variables, golden.images(name))), loaded


def _check(ours, theirs):
  assert np.std(theirs) > 0
  assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
    for name in golden.CASES
  ],
)
def test_golden(name, tmp_path):
  tensors, theirs = golden.read(name)
  ours, loaded = _logits(tmp_path / 'weights.safetensors', name, tensors)
  assert loaded.num_classes == golden.CLASSES
  _check(ours, theirs)


@pytest.mark.torch
@pytest.mark.parametrize('name', golden.CASES)
def test_torch(name, tmp_path):
  pytest.importorskip('torch')
  pytest.importorskip(golden.CASES[name][1].partition(':')[0])
  network, tensors = golden.network(name)
  ours, _ = _logits(tmp_path / 'weights.safetensors', name, tensors)
  _check(ours, golden.logits(name, network))
