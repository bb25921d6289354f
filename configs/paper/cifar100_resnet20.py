"""ResNet-20 on CIFAR-100, W4A4, with the paper's schedule.

Paper: ClusterQ, arXiv 2205.00179 (table I: 67.09 % from a teacher of 70.33 %).

    python -m clusterq_jax.main --config=configs/paper/cifar100_resnet20.py \
        --workdir=runs/paper_cifar100_resnet20

It needs weights/resnet20_cifar100.pth: save the state dict of pytorchcv's
get_model("resnet20_cifar100", pretrained=True) with torch.save.

The run has 10,000 warm-up steps and 70,000 joint steps of 200 images, so it
needs an accelerator. It has not been run to its end: accuracy and time are
unknown.
"""

import clusterq_jax as cq


def get_config():
  """Returns the paper's values with the teacher's weights."""
  config = cq.paper_config()
  config.teacher.weights = 'weights/resnet20_cifar100.pth'
  config.teacher.image_size = (32, 32)
  # pytorchcv trains its CIFAR networks with these values.
  config.teacher.mean = (0.4914, 0.4822, 0.4465)
  config.teacher.std = (0.2023, 0.1994, 0.2010)
  return config
