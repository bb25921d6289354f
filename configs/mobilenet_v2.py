"""MobileNetV2 on ImageNet, W4A4, with the paper's schedule.

Paper: ClusterQ, arXiv 2205.00179, table II (63.33 from a 73.03 teacher).

    python -m clusterq_jax.main --config=configs/mobilenet_v2.py \
        --workdir=runs/mobilenet_v2

Needs weights/mobilenet_v2.pth. 10,000 warm-up and 70,000 joint steps of 16 images: for
an accelerator. Not run here; accuracy and time unknown. The same network with
the short recipe: start from `efficientnet_lite0.py`.
"""

from clusterq_jax import config as config_lib


def get_config():
  """The paper's values; what remains is the teacher."""
  config = config_lib.imagenet()
  config.teacher.arch = 'mobilenet_v2'
  config.teacher.weights = 'weights/mobilenet_v2.pth'
  return config
