"""ResNet-20 on CIFAR-100, W4A4, with the paper's schedule.

Paper: ClusterQ, arXiv 2205.00179, table I (67.09 from a 70.33 teacher).

    python -m clusterq_jax.main --config=configs/cifar100_resnet20.py \
        --workdir=runs/cifar100

Needs weights/resnet20_cifar100.pth, in the layout of pytorchcv or of akamaster:
save the state dict of pytorchcv's get_model("resnet20_cifar100",
pretrained=True) there with torch.save, or set config.teacher.weights.
10,000 warm-up and 70,000 joint steps of 200 images: for an accelerator. Not run
here to the end; accuracy and time unknown.
"""

from clusterq_jax import config as config_lib


def get_config():
  """The defaults are the paper's; what remains is the teacher."""
  config = config_lib.defaults()
  config.teacher.weights = 'weights/resnet20_cifar100.pth'
  config.teacher.num_classes = 100
  config.teacher.image_size = (32, 32)
  # What pytorchcv trains its CIFAR networks with.
  config.teacher.mean = (0.4914, 0.4822, 0.4465)
  config.teacher.std = (0.2023, 0.1994, 0.2010)
  return config
