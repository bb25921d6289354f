"""The embedded default: ResNet-20 on Fashion-MNIST, W4A4, in two minutes.

Paper: ClusterQ, arXiv 2205.00179, with the short recipe. Teacher and test
images come with the project, and the weights file holds its preprocessing.

    python -m clusterq_jax.main --config=configs/fashion_mnist_resnet20.py \
        --workdir=runs/fashion_mnist

Accuracy and time: docs/results.md.
"""

import clusterq_jax as cq


def get_config():
  """Returns the short recipe at an eighth of its length, on shipped files."""
  config = cq.default_config()
  config.budget = 1 / 8
  config.eval.source = 'fashion_mnist'
  return config
