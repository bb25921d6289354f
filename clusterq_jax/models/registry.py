"""Architectures by name."""

import functools
from collections.abc import Callable

from flax import linen as nn

from clusterq_jax.errors import InputError
from clusterq_jax.layers import protocol
from clusterq_jax.models import resnet

Builder = Callable[[protocol.LayerSet], nn.Module]

_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
  f'resnet{depth}': functools.partial(resnet.CifarResNet, depth=depth)
  for depth in (8, 20, 32, 44, 56, 110)
}


def names() -> tuple[str, ...]:
  return tuple(_ARCHITECTURES)


def builder(arch: str, **options) -> Builder:
  """What makes the network `arch` from a layer set.

  Args:
    arch: a name from `names()`.
    **options: fields of the architecture, such as `num_classes`.

  Raises:
    InputError: no such architecture.
  """
  if arch not in _ARCHITECTURES:
    raise InputError(
      f'teacher.arch={arch!r} is not known; known are {", ".join(names())}'
    )
  return lambda layers: _ARCHITECTURES[arch](layers=layers, **options)
