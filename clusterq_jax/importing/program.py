"""A torch.export program as plain data, whatever it was read from."""

import dataclasses
import re
from typing import Any, NoReturn

import numpy as np

from clusterq_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Ref:
  """An operand that is a tensor of the program, by name."""

  name: str


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of an operator.

  Attributes:
    target: name of the operator, such as 'aten.conv2d.default'.
    operands: by name in the operator's schema: None, a bool, a number, a text,
      a `Ref`, or a list of these. Operands at their defaults may be absent.
    outputs: names of the results.
    place: the modules that it stands in, outermost first: (path, class).
  """

  target: str
  operands: dict[str, Any]
  outputs: tuple[str, ...]
  place: tuple[tuple[str, str], ...] = ()

  @property
  def op(self) -> str:
    """Returns torch's own operator without its overload; others as they are."""
    namespace, _, rest = self.target.partition('.')
    return rest.partition('.')[0] if namespace == 'aten' else self.target

  @property
  def where(self) -> str:
    """Describes the operator and where it stands, for messages."""
    if not self.place or not self.place[-1][0]:
      return f"{self.target} in the network's own forward"
    path, kind = self.place[-1]
    return f'{self.target} in {path} ({kind.rpartition(".")[2]})'


@dataclasses.dataclass(frozen=True)
class Program:
  """A program: one function from an image tensor to logits, and its weights.

  Attributes:
    source: what it was read from, for messages.
    calls: the calls in order.
    inputs: names of the inputs that the user gives.
    outputs: names of the results.
    shapes: shape of each tensor, by name.
    weights: key of the weight that a name stands for, such as 'conv1.weight'.
    tensors: the weights by key; floats are float32.
  """

  source: str
  calls: tuple[Call, ...]
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  shapes: dict[str, tuple[int, ...]]
  weights: dict[str, str]
  tensors: dict[str, np.ndarray]


def refuse_dynamic(source: str, name: str) -> NoReturn:
  """Raises the error for a size that is not a number."""
  raise InputError(
    f'{source}: tensor {name} has a dynamic size, expected fixed sizes: call '
    'torch.export.export without dynamic_shapes'
  )


def module_path(path: str) -> str:
  """Returns a module's path as in its state dict: 'layer1.0.conv1'.

  Older releases write "L['self'].layer1[0].conv1".
  """
  path = re.sub(r"^L\['\w+'\]\.?|^L__self__$", '', path)
  return re.sub(r"\['?(\w+)'?\]", r'.\1', path)
