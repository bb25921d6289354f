"""Writes the golden files of parity_test.py: what torch makes of our weights.

    pip install torch==2.13.0 torchvision pytorchcv timm \
        efficientnet-lite-pytorch
    python tests/golden/make.py

A file holds the names and shapes of a network's tensors and its logits, in
float64; weights and images come from `RandomState`, whose streams are fixed.
"""

import gzip
import importlib
import json
import pathlib
import sys

import numpy as np

from clusterq_jax.models import registry

FOLDER = pathlib.Path(__file__).resolve().parent
CLASSES, IMAGES = 10, 2

# Golden file: (our name of the architecture, how torch makes it).
CASES = {
  'torchvision_resnet18': ('resnet18', 'torchvision.models:resnet18'),
  'torchvision_resnet34': ('resnet34', 'torchvision.models:resnet34'),
  'torchvision_resnet50': ('resnet50', 'torchvision.models:resnet50'),
  'torchvision_mobilenet_v2': (
    'mobilenet_v2',
    'torchvision.models:mobilenet_v2',
  ),
  'pytorchcv_resnet18': ('resnet18', 'pytorchcv.models.resnet:resnet18'),
  'pytorchcv_resnet50': ('resnet50', 'pytorchcv.models.resnet:resnet50'),
  'pytorchcv_resnet50b': ('resnet50b', 'pytorchcv.models.resnet:resnet50b'),
  'pytorchcv_mobilenet_v2': (
    'mobilenet_v2',
    'pytorchcv.models.mobilenetv2:mobilenetv2_w1',
  ),
  'pytorchcv_resnet20': (
    'resnet20',
    'pytorchcv.models.resnet_cifar:resnet20_cifar10',
  ),
  'timm_resnet18': ('resnet18', 'timm.models.resnet:resnet18'),
  'timm_mobilenet_v2': (
    'mobilenet_v2',
    'timm.models.efficientnet:mobilenetv2_100',
  ),
  **{
    f'efficientnet_lite{i}': (
      f'efficientnet_lite{i}',
      'efficientnet_lite_pytorch:EfficientNet.from_name',
    )
    for i in range(5)
  },
}


def images(name: str) -> np.ndarray:
  """Network input of a case, float32 [IMAGES, H, W, 3]."""
  usual = registry.architecture(CASES[name][0]).preprocessing
  size = usual.get('image_size', (32, 32))
  random = np.random.RandomState(0)
  return random.randn(IMAGES, *size, 3).astype(np.float32)


def tensors(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
  """Weights as if trained: nothing at its default."""
  random = np.random.RandomState(1)

  def value(name, shape):
    kind = name.rsplit('.', 1)[-1]
    if kind == 'running_var' or (kind == 'weight' and len(shape) == 1):
      return random.uniform(0.5, 1.5, shape)
    if len(shape) == 1:
      return 0.2 * random.randn(*shape)
    return random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))

  return {
    name: value(name, shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def network(name: str):
  """The torch network of a case, with the weights of `tensors`."""
  import torch

  arch, source = CASES[name]
  module, _, function = source.partition(':')
  make = importlib.import_module(module)
  for part in function.split('.'):
    make = getattr(make, part)
  first = [arch.replace('_', '-')] if 'from_name' in function else []
  result = make(*first, num_classes=CLASSES)
  state = {
    key: value
    for key, value in result.state_dict().items()
    if not key.endswith('num_batches_tracked')
  }
  ours = tensors({key: list(value.shape) for key, value in state.items()})
  result.load_state_dict(
    {key: torch.from_numpy(value) for key, value in ours.items()}, strict=False
  )
  return result.double().eval(), ours


def logits(name: str, result) -> np.ndarray:
  """What a torch network answers to `images`, float64 [IMAGES, CLASSES]."""
  import torch

  x = torch.from_numpy(images(name).transpose(0, 3, 1, 2)).double()
  with torch.no_grad():
    return result(x).numpy()


def read(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """The weights and the logits of a golden file."""
  with gzip.open(FOLDER / f'{name}.json.gz', 'rt') as file:
    golden = json.load(file)
  return tensors(golden['shapes']), np.array(golden['logits'])


def main():
  for name in sys.argv[1:] or CASES:
    result, ours = network(name)
    golden = {
      'shapes': {key: list(value.shape) for key, value in ours.items()},
      'logits': logits(name, result).tolist(),
    }
    raw = gzip.compress(json.dumps(golden).encode(), mtime=0)
    (FOLDER / f'{name}.json.gz').write_bytes(raw)
    print(name, len(raw), 'bytes')


if __name__ == '__main__':
  main()
