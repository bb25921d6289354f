"""Configurations: fields, presets, and what is refused."""

from clusterq_jax.config.fields import Config
from clusterq_jax.config.presets import (
  default_config,
  paper,
  paper_imagenet,
  small_batches,
)
from clusterq_jax.config.resolve import (
  check_schema,
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
  'default_config',
  'describe',
  'differences',
  'flatten',
  'from_json',
  'paper',
  'paper_imagenet',
  'resolve',
  'small_batches',
  'to_json',
]
