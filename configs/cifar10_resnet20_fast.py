"""ResNet-20 on CIFAR-10, W4A4, with a short schedule.

Paper: ClusterQ, arXiv 2205.00179 (which loses 1.83 points at W4A4), with the
short recipe of `clusterq_jax.config.fast`.

    python -m clusterq_jax.main --config=configs/cifar10_resnet20_fast.py \
        --workdir=runs/cifar10_fast

Needs weights/resnet20-12fca82f.th: download
pretrained_models/resnet20-12fca82f.th of
https://github.com/akamaster/pytorch_resnet_cifar10 to there, or set
config.teacher.weights.

Measured on 5,000 CIFAR-10 test images: teacher 91.68; student 90.70, 90.80,
90.44 with seeds 0 to 2. A run takes about 20 minutes on one core.
"""

from clusterq_jax import config as config_lib


def get_config():
  """The short recipe, on the teacher of `cifar10_resnet20.py`."""
  config = config_lib.fast()
  config.teacher.weights = 'weights/resnet20-12fca82f.th'
  config.teacher.num_classes = 10
  config.teacher.image_size = (32, 32)
  config.teacher.mean = (0.485, 0.456, 0.406)
  config.teacher.std = (0.229, 0.224, 0.225)
  return config
