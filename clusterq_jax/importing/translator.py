"""Walks through the calls of a program and makes layers of them.

A tensor that depends on the image is a `Feature`: the layer that computes it
and torch's shape of it. A flattened or squeezed map is the same layer under
another shape, so that flatten, squeeze and view become nothing. All other
tensors are constants and are computed here (`constants`). What an operator
means is in `operators`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.importing import constants, refusals
from clusterq_jax.importing.layer import Layer, Shape, product
from clusterq_jax.importing.memory import Memory
from clusterq_jax.importing.program import Call, Program, Ref

_MOST_CALLS = 20_000
_LARGEST = 2**27  # numbers in all constants that are computed
_MOST_CHANNELS = 2**20
_LARGEST_MAP = 2**31  # numbers in a layer's output for one image

# Their results can share memory with the operand.
_VIEWS = frozenset(
  'view reshape flatten squeeze unsqueeze expand expand_as transpose permute '
  'detach alias contiguous slice select chunk split split_with_sizes unbind '
  'unflatten to float type_as '
  'dropout feature_dropout alpha_dropout feature_alpha_dropout'.split()
)


@dataclasses.dataclass(frozen=True)
class Feature:
  """A tensor that depends on the image.

  Attributes:
    layer: the layer that computes it.
    shape: torch's shape. It holds the layer's output in torch's order, or is
      that of a vector expanded to a map.
  """

  layer: Layer
  shape: tuple[int, ...]

  @property
  def is_map(self) -> bool:
    """Tells whether the shape is [N, C, H, W], or [N, C] for a vector."""
    own = self.layer.shape
    return self.shape[1:] == own or (
      self.layer.is_vector and self.shape[1:] == own[:1]
    )


Value = Feature | np.ndarray


class Translator:
  """Translates one program; `layers` grows call by call.

  Attributes:
    program: the program.
    call: the call that is being translated.
    layers: the layers so far.
    values: the tensors so far, by name.
  """

  def __init__(self, program: Program, handlers: Mapping[str, 'Handler']):
    self.program = program
    self._handlers = handlers
    self.layers: list[Layer] = []
    self.values: dict[str, Value] = {}
    self.call = Call('', {}, ())
    self._computed = 0
    self._memory = Memory()

  # --- Operands of the current call -----------------------------------------

  def refuse(self, why: str) -> NoReturn:
    """Raises the error for a call that cannot be translated.

    Args:
      why: what is wrong, and after a semicolon what to do; by default to do
        without the module.
    """
    if ';' not in why:
      why += '; replace the module, or take a network without it'
    raise InputError(f'{self.program.source}: {self.call.where}: {why}')

  def operand(self, name: str, default: Any = None) -> Any:
    """Returns an operand; tensors as their values."""
    value = self.call.operands.get(name, default)
    return self._resolve(value)

  def _resolve(self, value: Any) -> Any:
    if isinstance(value, Ref):
      if writer := self._memory.writer(value.name):
        self.refuse(
          f'it reads a result that {writer.where} has overwritten in place; '
          'set inplace=False there'
        )
      if value.name not in self.values:
        self.refuse(f'it reads {value.name}, which no call has computed')
      return self.values[value.name]
    if isinstance(value, list):
      return [self._resolve(each) for each in value]
    return value

  def first(self) -> str:
    """Returns the name of the main operand."""
    return 'self' if 'self' in self.call.operands else 'input'

  def feature(self, name: str = '') -> Feature:
    """Returns an operand that depends on the image; by default the first."""
    name = name or self.first()
    value = self.operand(name)
    if not isinstance(value, Feature):
      self.refuse(f'its operand {name} does not depend on the image')
    return value

  def map(self, name: str = '') -> Layer:
    """Returns the layer of such an operand of shape [N, C, H, W] or [N, C]."""
    value = self.feature(name)
    if not value.is_map:
      self.refuse(
        f'it takes a tensor of shape {list(value.shape)}, and only tensors '
        '[N, C, H, W], in this order, and vectors [N, C] can be imported'
      )
    return value.layer

  def constant(self, name: str) -> np.ndarray | None:
    """Returns an operand that is a constant, or None."""
    value = self.operand(name)
    if isinstance(value, Feature):
      self.refuse(
        f'its {name} depends on the image, and only fixed ones can be imported'
      )
    if value is None or isinstance(value, np.ndarray):
      return value
    self.refuse(f'its {name} is {value!r:.40}, expected a tensor')

  def plain(self, name: str, default: Any = None) -> Any:
    """Returns an operand that is no tensor."""
    value = self.operand(name, default)
    if isinstance(value, (Feature, np.ndarray)):
      self.refuse(f'its {name} is a tensor')
    return value

  def number(self, name: str, default: float) -> float:
    """Returns an operand that is a finite number."""
    value = self.operand(name, default)
    if isinstance(value, np.ndarray) and value.size == 1:
      value = float(value.reshape(()))
    if not isinstance(value, (int, float)) or not abs(value) < 1e30:
      self.refuse(f'its {name} is {value!r:.40}, expected a number')
    return value

  def integer(self, name: str, default: int) -> int:
    """Returns an operand that is a whole number."""
    value = self.operand(name, default)
    if type(value) is not int or not abs(value) <= 2**63:
      self.refuse(f'its {name} is {value!r:.40}, expected a whole number')
    return value

  def integers(
    self, name: str, default: Sequence[int], count: int | None = 2
  ) -> list[int]:
    """Returns `count` whole numbers; one stands for all of them."""
    value = self.plain(name, list(default))
    value = [value] if isinstance(value, int) else value
    if value == []:
      value = list(default)
    if isinstance(value, list) and len(value) == 1 and count:
      value = value * count
    if (
      not isinstance(value, list)
      or not all(type(n) is int and abs(n) < 2**31 for n in value)
      or count not in (None, len(value))
    ):
      self.refuse(f'its {name} is {value!r:.40}, expected whole numbers')
    return value

  def one(self, name: str, default: int) -> int:
    """Returns a number given for height and width, which must be equal."""
    high, wide = self.integers(name, (default, default))
    if high != wide:
      self.refuse(
        f'its {name} differs between height and width ({high}, {wide}), and '
        'only equal ones can be imported'
      )
    if high < 1:
      self.refuse(f'its {name} is {high}, expected at least 1')
    return high

  # --- Results ---------------------------------------------------------------

  def add(
    self,
    op: str,
    inputs: Sequence[Layer],
    shape: Shape,
    arrays: dict[str, np.ndarray] | None = None,
    *,
    weight: str = '',
    **options: Any,
  ) -> Layer:
    """Appends a layer.

    Args:
      op: see `Layer`.
      inputs: the layers that it reads.
      shape: (C, H, W) of its output.
      arrays: its variables.
      weight: operand whose key names the layer; by default its module does.
      **options: fields of the layer.
    """
    for name, size in zip('CHW', shape, strict=True):
      if size < 1:
        self.refuse(f'its result has no pixel or channel ({name} = {size})')
    if shape[0] > _MOST_CHANNELS or product(shape) > _LARGEST_MAP:
      self.refuse(f'its result is {list(shape)}, which is too large')
    arrays = arrays or {}
    # Others are parts of the weights.
    self._take(sum(a.size for a in arrays.values() if a.base is None))
    layer = Layer(
      op,
      list(inputs),
      shape,
      options,
      arrays,
      self._name(op, weight, options),
      self.call.where,
    )
    self.layers.append(layer)
    return layer

  def _name(self, op: str, weight: str, options: dict[str, Any]) -> str:
    ref = self.call.operands.get(weight)
    key = self.program.weights.get(ref.name, '') if isinstance(ref, Ref) else ''
    if '.' in key:
      return key.rpartition('.')[0]
    path, kind = self.call.place[-1] if self.call.place else ('', '')
    last = options.get('act') or op
    if path and kind.startswith('torch.nn.modules.') and last != 'mul':
      return path
    return f'{path}.{last}' if path else last

  def shape_of(self, name: str) -> tuple[int, ...]:
    """Returns torch's shape of a tensor."""
    if name not in self.program.shapes:
      self.refuse(f'the program does not tell the shape of {name}')
    return self.program.shapes[name]

  def reshaped(self, value: Feature, name: str) -> Feature:
    """Returns a feature under the shape that the program gives a result."""
    shape = self.shape_of(name)
    if product(shape) != product(value.shape):
      self.refuse(f'it makes {list(shape)} of {list(value.shape)}')
    if shape[:1] != value.shape[:1]:
      if value.shape[0] == 1:
        self.refuse(refusals.ambiguous_batch(self.program))
      self.refuse(
        f'it mixes the images of a batch ({list(value.shape)} becomes '
        f'{list(shape)})'
      )
    return Feature(value.layer, shape)

  # --- The program -----------------------------------------------------------

  def run(self) -> list[Layer]:
    """Translates all calls; returns the layers, a layer 'output' last."""
    program = self.program
    refusals.check_signature(program)
    if len(program.calls) > _MOST_CALLS:
      raise InputError(
        f'{program.source}: {len(program.calls):,} calls, expected at most '
        f'{_MOST_CALLS:,}'
      )
    (image,) = program.inputs
    shape = self.shape_of(image)
    _, c, h, w = shape
    layer = Layer('input', [], (c, h, w), name='input')
    self.layers.append(layer)
    self.values[image] = Feature(layer, shape)
    for name, key in program.weights.items():
      self.values[name] = program.tensors[key]
    for call in program.calls:
      self.call = call
      self._run_call()
    (result,) = program.outputs
    self.call = Call('the output', {'self': Ref(result)}, ())
    value = self.operand('self')
    if not isinstance(value, Feature):
      raise InputError(
        f'{program.source}: the result does not depend on the image'
      )
    if len(value.shape) != 2 or not value.is_map or value.shape[1] < 2:
      refusals.refuse_head(program, value.shape)
    self.layers.append(Layer('output', [value.layer], value.layer.shape))
    return self.layers

  def _run_call(self) -> None:
    call = self.call
    if not call.outputs:
      return  # an assertion
    op = call.op
    # A pair of underscores, as in __and__, does not mean in place.
    in_place = op.endswith('_') and not op.endswith('__')
    op = op.removesuffix('_') if in_place else op
    operands = {name: self.operand(name) for name in call.operands}
    fixed = not any(map(_depends, operands.values()))
    # Of the other operand, only the shape or the type matters.
    like = op in constants.LIKE and not _depends(operands.get(self.first()))
    if fixed or like or op in constants.FILLS:
      self._fold(op, operands)
    elif op in self._handlers:
      results = self._handlers[op](self)
      if not isinstance(results, list):
        results = [results]
      self._keep(results)
    else:
      self.refuse(refusals.why(call.target))
    if (name := self._own()) is None:
      return
    if in_place:
      for twin in self._memory.overwrite(name, call):
        self.values[twin] = self.values[call.outputs[0]]
    elif op in _VIEWS:
      self._memory.share(name, call)

  def _fold(self, op: str, operands: dict[str, Any]) -> None:
    if len(self.call.outputs) != 1:
      self.refuse(refusals.why(self.call.target))
    (name,) = self.call.outputs
    result = constants.evaluate(op, operands, self.shape_of(name))
    if result is None:
      self.refuse(
        'it computes with constants only, in a way that is not known or is too '
        'large; compute its result once, in the constructor of the module, and '
        'keep it with register_buffer'
      )
    self._take(result.size if result.base is None else 0)
    self.values[name] = result

  def _take(self, numbers: int) -> None:
    """Counts the numbers of computed constants, and refuses too many."""
    self._computed += numbers
    if self._computed > _LARGEST:
      self.refuse('the constants take too much memory')

  def _keep(self, results: list[Feature]) -> None:
    """Keeps results whose shapes are those of the program."""
    for name, result in zip(self.call.outputs, results, strict=False):
      if name in self.program.shapes and result.shape != self.shape_of(name):
        self.refuse(
          f'the importer computes the shape {list(result.shape)}, the program '
          f'says {list(self.shape_of(name))}; if torch wrote the program, this '
          'is a defect of the importer: please report it'
        )
      self.values[name] = result

  def _own(self) -> str | None:
    """Returns the name of the tensor whose memory the call returns."""
    ref = self.call.operands.get(self.first())
    return ref.name if isinstance(ref, Ref) else None


def _depends(value: Any) -> bool:
  if isinstance(value, list):
    return any(map(_depends, value))
  return isinstance(value, Feature)


# Translates the current call; returns its result, or a list of them.
Handler = Callable[[Translator], Feature | list[Feature]]
