"""Why a program cannot be imported, and what its owner can do."""

from typing import NoReturn

from clusterq_jax.errors import InputError
from clusterq_jax.importing.program import Program
from clusterq_jax.weights import checks

TRAINING = (
  'the network is in train mode; call network.eval() before torch.export.export'
)
_WHOLE = (
  'export the network itself with torch.export.export, without '
  'run_decompositions()'
)
_DECOMPOSED = f'BatchNorm is already decomposed; {_WHOLE}'
_PRODUCTS = (
  'products of matrices, such as attention, cannot be imported; write a dense '
  'layer as nn.Linear, and take a network without attention'
)
# What an operator means, by a part of its name; the first that fits.
_REASONS = {
  'native_batch_norm': _DECOMPOSED,
  'cudnn_batch_norm': _DECOMPOSED,
  'layer_norm': 'LayerNorm cannot be imported: only BatchNorm keeps the '
  'statistics that the method matches; take a network with BatchNorm',
  'group_norm': 'GroupNorm cannot be imported: only BatchNorm keeps the '
  'statistics that the method matches; take a network with BatchNorm',
  'instance_norm': 'InstanceNorm cannot be imported: only BatchNorm keeps the '
  'statistics that the method matches; take a network with BatchNorm',
  'attention': 'attention cannot be imported; take a convolutional network',
  'softmax': 'softmax cannot be imported; if it ends the network, return the '
  'logits before it, else it is attention: take a network without it',
  'matmul': _PRODUCTS,
  'bmm': _PRODUCTS,
  'addmm': f'dense layers are already decomposed; {_WHOLE}',
  'convolution': f'convolutions are already decomposed; {_WHOLE}',
  'transpose2d': 'transposed convolutions cannot be imported; use nearest '
  'upsampling and a convolution',
  'bilinear': 'bilinear resizing cannot be imported; use nearest upsampling by '
  'a whole factor',
  'bicubic': 'bicubic resizing cannot be imported; use nearest upsampling by a '
  'whole factor',
  'sym_size': 'it asks for a size that is not fixed; export without '
  'dynamic_shapes',
}


def why(target: str) -> str:
  """Returns why an operator that is not known cannot be imported."""
  for part, reason in _REASONS.items():
    if part in target:
      return reason
  return (
    'no layer computes it (docs/networks.md lists those that exist); replace '
    'the module, or take a network without it'
  )


def ambiguous_batch(program: Program) -> str:
  """Returns why a reshape of a batch of one cannot be understood."""
  shape = program.shapes[program.inputs[0]]
  sizes = ', '.join(map(str, shape[1:]))
  return (
    'the example is a batch of 1, and this reshape could mean the batch or '
    'another axis; export with a batch of 2: torch.export.export('
    f'network.eval(), (torch.zeros(2, {sizes}),))'
  )


def check_signature(program: Program) -> None:
  """Refuses what is no function from one image tensor to one tensor."""
  source, shapes = program.source, program.shapes
  if len(program.inputs) != 1 or program.inputs[0] not in shapes:
    raise InputError(
      f'{source}: the network takes {len(program.inputs)} inputs, expected '
      'one: images [N, C, H, W]'
    )
  shape = shapes[program.inputs[0]]
  if len(shape) != 4 or min(shape) < 1:
    raise InputError(
      f'{source}: the network takes a tensor {list(shape)}, expected images '
      '[N, C, H, W]'
    )
  if shape[1] not in checks.CHANNELS:
    raise InputError(
      f'{source}: the network takes images of {shape[1]} channels, expected 1 '
      '(grey), 3 (colour) or 4'
    )
  if max(shape[2:]) >= 2**15:
    raise InputError(f'{source}: the network takes images {list(shape)}')
  if len(program.outputs) != 1:
    raise InputError(
      f'{source}: the network returns {len(program.outputs)} tensors, expected '
      'one: the logits [N, K]; wrap it in a module that returns only them'
    )


def refuse_head(program: Program, shape: tuple[int, ...]) -> NoReturn:
  """Refuses a result that is not logits."""
  raise InputError(
    f'{program.source}: the network returns a tensor {list(shape)}, expected '
    'logits [N, K] of at least 2 classes: only classifiers can be imported'
  )


def check_batch_norms(program: Program, found: int) -> None:
  """Refuses a network without BatchNorm."""
  if found:
    return
  kept = [key for key in program.weights.values() if 'running_mean' in key]
  if kept:
    raise InputError(
      f'{program.source}: BatchNorm is already decomposed or folded (no call '
      f'uses statistics such as {kept[0]}); {_WHOLE}'
    )
  raise InputError(
    f'{program.source}: the network has no BatchNorm, whose statistics the '
    'method matches; take a network with BatchNorm, as it was trained, not '
    'folded into the convolutions'
  )
