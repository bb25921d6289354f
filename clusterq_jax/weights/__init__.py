"""Reads a teacher's weights from files and checks them.

files, torch_files   read and write files; an `entries.Entry` is one
                     dictionary of tensors in a file
layouts              tell how each source names and orders its tensors
matching             compares tensors with those that an architecture needs
choosing             chooses the entry that fits
checks               refuse what cannot be used
fitting              loads weights, with the modules above
graph_weights        writes and reads files that carry their graph
teacher              adds the network and the expected input
"""

from clusterq_jax.weights.files import (
  read_tensors,
  unflatten,
  write_safetensors,
)
from clusterq_jax.weights.fitting import load
from clusterq_jax.weights.graph_weights import Loaded, save

__all__ = [
  'Loaded',
  'load',
  'read_tensors',
  'save',
  'unflatten',
  'write_safetensors',
]
