"""Turns a live torch.export.ExportedProgram into a `Program`; needs torch."""

import operator
from typing import Any

import numpy as np

from clusterq_jax.importing.program import (
  Call,
  Program,
  Ref,
  module_path,
  refuse_dynamic,
)


def read(exported: Any, source: str) -> Program:
  """Reads a program that torch.export.export returned.

  Args:
    exported: the torch.export.ExportedProgram.
    source: name of the network, for messages.

  Raises:
    InputError: sizes that are not fixed.
  """
  signature = exported.graph_signature
  weights = {
    **signature.inputs_to_parameters,
    **signature.inputs_to_buffers,
    **signature.inputs_to_lifted_tensor_constants,
  }
  stored = {**exported.constants, **exported.state_dict}
  shapes, calls, inputs = {}, [], []
  for node in exported.graph.nodes:
    shape = getattr(node.meta.get('val'), 'shape', None)
    if shape is not None:
      if not all(type(size) is int for size in shape):
        refuse_dynamic(source, node.name)
      shapes[node.name] = tuple(shape)
    if node.op == 'placeholder' and node.name not in weights:
      inputs.append(node.name)
    elif node.op == 'call_function' and node.target is not operator.getitem:
      calls.append(_call(node))
  return Program(
    source,
    tuple(calls),
    tuple(inputs),
    tuple(name for name in signature.user_outputs if name is not None),
    shapes,
    weights,
    {key: _array(stored[key]) for key in weights.values()},
  )


def _array(tensor: Any) -> np.ndarray:
  tensor = tensor.detach().cpu()
  return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _call(node: Any) -> Call:
  schema = getattr(node.target, '_schema', None)
  names = [argument.name for argument in schema.arguments] if schema else []
  names += [str(index) for index in range(len(names), len(node.args))]
  operands = dict(zip(names, node.args, strict=False)) | node.kwargs
  stack = node.meta.get('nn_module_stack') or {}
  return Call(
    str(node.target),
    {name: _operand(value) for name, value in operands.items()},
    _outputs(node),
    tuple(
      (module_path(path), kind if isinstance(kind, str) else kind.__qualname__)
      for path, kind in stack.values()
    ),
  )


def _outputs(node: Any) -> tuple[str, ...]:
  """Returns the names of a call's results, which `getitem` takes apart."""
  value = node.meta.get('val')
  if value is None:
    return ()  # an assertion
  if not isinstance(value, (list, tuple)):
    return (node.name,)
  names = {
    user.args[1]: user.name
    for user in node.users
    if user.target is operator.getitem
  }
  return tuple(names.get(i, f'{node.name}.{i}') for i in range(len(value)))


def _operand(value: Any) -> Any:
  if isinstance(value, (list, tuple)):
    return [_operand(each) for each in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return Ref(value.name) if hasattr(value, 'users') else str(value)
