"""ResNet-18 on ImageNet, W4A4, with the paper's schedule.

Paper: ClusterQ, arXiv 2205.00179 (table II: 64.39 % from a teacher of 71.47 %).

    python -m clusterq_jax.main --config=configs/paper/resnet18.py \
        --workdir=runs/paper_resnet18

It needs weights/resnet18.pth from torchvision.

The run has 10,000 warm-up steps and 70,000 joint steps of 16 images, so it
needs an accelerator. It has not been run to its end: accuracy and time are
unknown.
"""

import clusterq_jax as cq


def get_config():
  """Returns the paper's values with the teacher's weights."""
  config = cq.paper_imagenet_config()
  config.teacher.arch = 'resnet18'
  config.teacher.weights = 'weights/resnet18.pth'
  return config
