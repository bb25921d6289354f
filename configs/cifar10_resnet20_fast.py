"""ResNet-20 on CIFAR-10, W4A4, in about 20 minutes on one core.

Paper: ClusterQ, arXiv 2205.00179, with the short recipe. The paper's own
schedule is paper/cifar10_resnet20.py.

    python -m clusterq_jax.main --config=configs/cifar10_resnet20_fast.py \
        --workdir=runs/cifar10

It needs weights/resnet20-12fca82f.th: download it from pretrained_models/ of
https://github.com/akamaster/pytorch_resnet_cifar10. Accuracy and time:
docs/results.md.
"""

import clusterq_jax as cq


def get_config():
  """Returns the short recipe with akamaster's weights."""
  config = cq.default_config()
  config.teacher.weights = 'weights/resnet20-12fca82f.th'
  config.teacher.image_size = (32, 32)
  config.teacher.mean = (0.485, 0.456, 0.406)
  config.teacher.std = (0.229, 0.224, 0.225)
  return config
