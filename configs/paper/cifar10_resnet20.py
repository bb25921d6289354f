"""ResNet-20 on CIFAR-10, W4A4, with the paper's schedule.

Paper: ClusterQ, arXiv 2205.00179 (table I: 92.06 % from a teacher of 93.89 %).

    python -m clusterq_jax.main --config=configs/paper/cifar10_resnet20.py \
        --workdir=runs/paper_cifar10_resnet20

It needs weights/resnet20-12fca82f.th: download it from pretrained_models/ of
https://github.com/akamaster/pytorch_resnet_cifar10.

The run has 10,000 warm-up steps and 70,000 joint steps of 200 images, so it
needs an accelerator. It has not been run to its end: accuracy and time are
unknown.
"""

import clusterq_jax as cq


def get_config():
  """Returns the paper's values with the teacher's weights."""
  config = cq.paper_config()
  config.teacher.weights = 'weights/resnet20-12fca82f.th'
  config.teacher.image_size = (32, 32)
  config.teacher.mean = (0.485, 0.456, 0.406)
  config.teacher.std = (0.229, 0.224, 0.225)
  return config
