"""MobileNetV2 on ImageNet, W4A8, with the short recipe.

Paper: ClusterQ, arXiv 2205.00179. The paper's own schedule is
paper/mobilenet_v2.py.

    python -m clusterq_jax.main --config=configs/mobilenet_v2.py \
        --workdir=runs/mobilenet_v2

It needs weights/mobilenet_v2.pth from torchvision. The numbers equal those of
efficientnet_lite0.py. This config has not been run: accuracy and time are
unknown.
"""

import clusterq_jax as cq


def get_config():
  """Returns the short recipe for 224 x 224 pixels."""
  config = cq.imagenet_config()
  config.teacher.arch = 'mobilenet_v2'
  config.teacher.weights = 'weights/mobilenet_v2.pth'
  return config
