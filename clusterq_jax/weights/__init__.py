"""Reading a teacher's weights: safe files in, a checked Flax tree out.

`files` reads and writes files, `layouts` knows how each source names and
orders its tensors, `fitting` takes what fits an architecture exactly.
"""

from clusterq_jax.weights.files import (
  read_tensors,
  unflatten,
  write_safetensors,
)
from clusterq_jax.weights.fitting import FORMAT, Loaded, load

__all__ = [
  'FORMAT',
  'Loaded',
  'load',
  'read_tensors',
  'unflatten',
  'write_safetensors',
]
