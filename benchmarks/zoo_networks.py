"""Builds networks of torchvision, timm and pytorchcv that look trained."""

import torch
from torch import nn
from torch.nn import functional

from clusterq_jax.importing import zoo

# Its compiled part fits one build of torch; classifiers do not need it.
zoo.import_library('torchvision', 'torchvision:')

_IMAGES = 8  # that give the BatchNorm statistics
_OCTAVES = 5
_NEGATIVE = 0.05  # share of negative gains
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def build(name: str) -> nn.Module:
  """Builds 'SOURCE:NAME' without published weights, in eval mode."""
  source, name = name.split(':')
  if source == 'timm':
    import timm

    network = timm.create_model(name)
  elif source == 'pytorchcv':
    from pytorchcv.model_provider import get_model

    network = get_model(name)
  else:
    from torchvision import models

    network = models.get_model(name, weights=None)
  return network.eval()


def smooth_images(count: int, side: int, seed: int) -> torch.Tensor:
  """Draws images with structure at all scales, float32 [B, 3, side, side].

  Each has a mean of 0 and a standard deviation of 1, like normalised input.
  """
  random = torch.Generator().manual_seed(seed)
  x = torch.zeros(count, 3, side, side)
  for octave in range(_OCTAVES):
    cells = max(2, side >> octave)
    noise = torch.randn(count, 3, cells, cells, generator=random)
    noise = functional.interpolate(noise, (side, side), mode='bilinear')
    x += noise * 2**octave
  deviation, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
  return (x - mean) / deviation


@torch.no_grad()
def make_trained(network: nn.Module, side: int) -> None:
  """Gives a network gains, biases and statistics as if it were trained.

  Args:
    network: in eval mode; it changes in place.
    side: height and width of the input in pixels.
  """
  random = torch.Generator().manual_seed(0)
  norms = [m for m in network.modules() if isinstance(m, _NORMS)]
  for norm in norms:
    if norm.affine:
      norm.weight.uniform_(0.5, 1.5, generator=random)
      flipped = torch.rand(norm.weight.shape, generator=random) < _NEGATIVE
      norm.weight[flipped] *= -1
      norm.bias.uniform_(-0.3, 0.3, generator=random)
    norm.reset_running_stats()
    norm.momentum = None  # the mean over all images seen
    norm.train()
  for module in network.modules():
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
      module.bias.uniform_(-0.1, 0.1, generator=random)
  network(smooth_images(_IMAGES, side, seed=1))
  network.eval()
