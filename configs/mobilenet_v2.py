"""MobileNetV2 on ImageNet, W4A8, with the short recipe.

Paper: ClusterQ, arXiv 2205.00179. The paper's own schedule is
paper/mobilenet_v2.py.

    python -m clusterq_jax.main --config=configs/mobilenet_v2.py \
        --workdir=runs/mobilenet_v2

Needs weights/mobilenet_v2.pth, from torchvision. The numbers are those of
efficientnet_lite0.py. Not run here: accuracy and time unknown.
"""

import clusterq_jax as cq


def get_config():
  """Runs the short recipe on batches that two cores can carry."""
  config = cq.default_config()
  config.budget = 1 / 6
  config.teacher.arch = 'mobilenet_v2'
  config.teacher.weights = 'weights/mobilenet_v2.pth'
  config.teacher.num_classes = 1000
  config.quant.activation_bits = 8
  config.generator.channels = (128, 96, 64, 32, 16, 8)
  config.centroids.images_per_class = 1
  config.schedule.batch_size = 16
  # A quarter of the recipe's rates, as of its batch.
  config.student.lr = 1.5e-4
  config.student.quant_lr = 5e-4
  config.eval.batch_size = 50
  return config
