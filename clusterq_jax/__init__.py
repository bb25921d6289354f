"""Data-free quantization of image classifiers.

import clusterq_jax as cq

config = cq.imagenet_config()
config.teacher.arch = 'resnet18'
config.teacher.weights = 'resnet18.safetensors'
results = cq.quantize(config, 'runs/mine')
student = cq.load_student('runs/mine')
logits = student.logits(images)  # uint8 [B, H, W, C]
"""

from clusterq_jax import environment

environment.prepare()  # before JAX is imported, which is below

from clusterq_jax.config import (  # noqa: E402
  default_config,
  imagenet_config,
  paper_config,
  paper_imagenet_config,
  quantize_config,
)
from clusterq_jax.deploy.student import Student  # noqa: E402
from clusterq_jax.deploy.student import load as load_student  # noqa: E402
from clusterq_jax.errors import InputError  # noqa: E402
from clusterq_jax.importing import from_torch  # noqa: E402
from clusterq_jax.models.preprocessing import Preprocessing  # noqa: E402
from clusterq_jax.models.protocol import LayerSet  # noqa: E402
from clusterq_jax.models.registry import (  # noqa: E402
  register as register_network,
)
from clusterq_jax.modes.evaluate import evaluate  # noqa: E402
from clusterq_jax.modes.export import export  # noqa: E402
from clusterq_jax.modes.quantize import quantize  # noqa: E402

__all__ = [
  'InputError',
  'LayerSet',
  'Preprocessing',
  'Student',
  'default_config',
  'evaluate',
  'export',
  'from_torch',
  'imagenet_config',
  'load_student',
  'paper_config',
  'paper_imagenet_config',
  'quantize',
  'quantize_config',
  'register_network',
]
