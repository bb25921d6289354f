"""ResNet-50 on ImageNet, W4A4, with the paper's schedule.

Paper: ClusterQ, arXiv 2205.00179, which has no figure for this network.

    python -m clusterq_jax.main --config=configs/resnet50.py \
        --workdir=runs/resnet50

Needs weights/resnet50.pth. 10,000 warm-up and 70,000 joint steps of 16 images: for
an accelerator. Not run here; accuracy and time unknown. The same network with
the short recipe: start from `efficientnet_lite0.py`.
"""

from clusterq_jax import config as config_lib


def get_config():
  """The paper's values; what remains is the teacher."""
  config = config_lib.imagenet()
  config.teacher.arch = 'resnet50'
  config.teacher.weights = 'weights/resnet50.pth'
  return config
