"""A network of your own: a ResNet-20 variant on CIFAR-100, W4A4.

Paper: ClusterQ, arXiv 2205.00179, with the short recipe. The network is in
networks/resnet20_variant.py; docs/networks.md explains how to write one.

    python -m clusterq_jax.main --config=configs/cifar100_variant.py \
        --workdir=runs/cifar100_variant

It needs weights/resnet20_cifar100_variant.pt, the state dict of the network in
networks/resnet20_variant.py, saved with torch.save. A run takes about
25 minutes on one core. Accuracy and time: docs/results.md.
"""

import pathlib
import runpy

import clusterq_jax as cq

# A config file runs from any folder and outside a package, so it cannot import
# the network by module name.
_NETWORK = pathlib.Path(__file__).parent / 'networks' / 'resnet20_variant.py'


def get_config():
  """Returns the short recipe with the registered network."""
  runpy.run_path(str(_NETWORK))['register']()
  config = cq.default_config()
  config.teacher.arch = 'resnet20_variant'
  config.teacher.weights = 'weights/resnet20_cifar100_variant.pt'
  return config
