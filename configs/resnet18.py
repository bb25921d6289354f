"""ResNet-18 on ImageNet, W4A8, with the short recipe.

Paper: ClusterQ, arXiv 2205.00179. The paper's own schedule is
paper/resnet18.py.

    python -m clusterq_jax.main --config=configs/resnet18.py \
        --workdir=runs/resnet18

It needs weights/resnet18.pth from torchvision. The numbers equal those of
efficientnet_lite0.py. This config has not been run: accuracy and time are
unknown.
"""

import clusterq_jax as cq


def get_config():
  """Returns the short recipe for 224 x 224 pixels."""
  config = cq.imagenet_config()
  config.teacher.arch = 'resnet18'
  config.teacher.weights = 'weights/resnet18.pth'
  return config
