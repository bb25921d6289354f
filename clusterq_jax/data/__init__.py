"""Labelled images for evaluation. Quantization never reads them."""

from clusterq_jax.data.assets import ASSETS
from clusterq_jax.data.images import (
  FASHION_MNIST_CLASSES,
  Images,
  load,
  read_fashion_mnist,
  read_idx,
  read_npz,
)

__all__ = [
  'ASSETS',
  'FASHION_MNIST_CLASSES',
  'Images',
  'load',
  'read_fashion_mnist',
  'read_idx',
  'read_npz',
]
