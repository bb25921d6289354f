"""Defines, checks and stores configurations."""

from clusterq_jax.config.fields import Config
from clusterq_jax.config.presets import (
  default_config,
  imagenet_config,
  paper_config,
  paper_imagenet_config,
  quantize_config,
)
from clusterq_jax.config.validation import (
  check_schema,
  complete,
  describe,
  differences,
  flatten,
  from_json,
  resolve,
  to_json,
)

__all__ = [
  'Config',
  'check_schema',
  'complete',
  'default_config',
  'describe',
  'differences',
  'flatten',
  'from_json',
  'imagenet_config',
  'paper_config',
  'paper_imagenet_config',
  'quantize_config',
  'resolve',
  'to_json',
]
