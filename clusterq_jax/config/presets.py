"""Makes the configs that config files start from.

The defaults in `fields.py` are the short recipe. The paper's values are here.
"""

import dataclasses
import typing
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from clusterq_jax.config import fields


def kind_of(annotation: Any) -> type:
  """Returns the type of a field's values: int, float, bool, str or tuple.

  Args:
    annotation: annotation of the field, such as `int | None`.
  """
  options = [a for a in typing.get_args(annotation) if a is not type(None)]
  origin = typing.get_origin(annotation)
  if origin is tuple:
    return tuple
  return kind_of(options[0]) if options else annotation


def _config_dict(section: Any) -> ml_collections.ConfigDict:
  """Returns a section's fields; None becomes a placeholder of their type."""
  found = ml_collections.ConfigDict()
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      value = _config_dict(value)
    elif value is None:
      value = placeholder(kind_of(field.type))
    found[field.name] = value
  return found


def default_config() -> ml_collections.ConfigDict:
  """Returns the short recipe on the embedded teacher.

  The recipe takes minutes on two CPU cores. docs/method.md explains where it
  departs from the paper. `config.budget` makes the run longer or shorter.
  """
  config = _config_dict(fields.Config()).lock()
  config.budget = 1.0
  return config


def quantize_config() -> ml_collections.ConfigDict:
  """Returns the short recipe at W8A8 for a weights file with its own graph.

  Set `config.teacher.weights`. Budget, generator, batch and learning rates
  follow from the network; see docs/method.md.
  """
  config = _config_dict(fields.Config()).lock()
  config.teacher.arch = ''
  config.teacher.weights = ''
  config.quant.weight_bits = 8
  config.quant.activation_bits = 8
  return config


def imagenet_config() -> ml_collections.ConfigDict:
  """Returns the short recipe at W4A8 for networks with names, on ImageNet.

  Two CPU cores can run it. Budget, generator, batch and learning rates follow
  from the network; see docs/method.md.
  """
  config = _config_dict(fields.Config()).lock()
  config.quant.activation_bits = 8
  return config


def paper_config() -> ml_collections.ConfigDict:
  """Returns the paper's values for CIFAR.

  References:
    ClusterQ, arXiv 2205.00179, section IV.
  """
  config = default_config()
  config.checkpoint_every = 1000
  config.quant.placement = 'paper'
  config.quant.ranges = 'minmax'
  config.quant.headroom = 0.0
  config.generator.channels = (128, 128, 64)
  config.generator.conditional = False
  config.generator.prototypes = 0
  config.generator.lr = 1e-3
  config.student.optimizer = 'sgd'
  config.student.lr = 1e-4
  config.student.quant_lr = 2e-3
  config.loss.statistics = 0.1
  config.loss.sfda = 0.9
  config.loss.diversity = 0.6
  config.loss.noise = (0.5, 1.0)
  config.loss.relative = False
  config.loss.class_reduction = 'sum'
  config.loss.student_cross_entropy = 1.0
  config.loss.features = 0.0
  config.centroids.decay = 0.2
  config.centroids.images_per_class = 32
  config.schedule.batch_size = 200
  config.schedule.warmup_steps = 10_000
  config.schedule.generator_steps = 0
  config.schedule.joint_steps = 70_000
  config.schedule.student_steps = 0
  config.schedule.pool_batches = 0
  config.schedule.procedural_batches = 0
  config.schedule.lr_decay = 'step'
  config.augment.probability = 0.5
  config.augment.mixup = 0.0
  config.augment.adversarial = 0.0
  config.eval.batch_size = 250
  config.report.log_every = 100
  return config


def paper_imagenet_config() -> ml_collections.ConfigDict:
  """Returns the paper's values for ImageNet.

  References:
    ClusterQ, arXiv 2205.00179, section IV.
  """
  config = paper_config()
  config.generator.conditional = True
  config.student.lr = 1e-6
  config.schedule.batch_size = 16
  return config
