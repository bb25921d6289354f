"""Imports networks of torch as graphs.

program        a torch.export program as plain data
pt2_files      reads it from a file, without torch; `tensors` reads its weights
live           reads it from torch's own object
translator     walks through its calls; `constants` computes what no image
               changes, `memory` knows what shares it, `refusals` says why
               something cannot be imported
operators      makes layers of each operator
passes         rewrite layers until a graph has them; `classifier` the last
names          names them
network        the whole import
files          writes what was imported as a teacher's file
torch_networks imports a live network and compares it with torch
zoo            builds networks of torchvision, timm and pytorchcv by name
"""

from clusterq_jax.importing.files import check_output, write
from clusterq_jax.importing.network import Imported, import_program
from clusterq_jax.importing.torch_networks import (
  SOUND,
  describe,
  difference,
  from_torch,
  import_live,
  logits,
  only_tensor,
  parity,
)

__all__ = [
  'SOUND',
  'Imported',
  'check_output',
  'describe',
  'difference',
  'from_torch',
  'import_live',
  'import_program',
  'logits',
  'only_tensor',
  'parity',
  'write',
]
