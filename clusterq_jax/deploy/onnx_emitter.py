"""Emits the ONNX nodes of a graph, for the float and the integer model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clusterq_jax.deploy import tables
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.node import Node
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.ops import convolution

_OPSET, _IR_VERSION = 21, 10
_IMAGES, _LOGITS = 'images', 'logits'
_FIRST_SIZE = 0  # a Reshape keeps the size of that axis


class Emitter:
  """Emitter of ONNX nodes for the layers of a graph.

  The output tensor of a layer has the layer's name. A vector is [N, C, 1, 1].
  Subclasses define how a layer reads an input, what its weights are, and how it
  writes its output. Layers that only move values read and write tensors
  themselves: codes remain codes.
  """

  def __init__(self, graph: Graph, preprocessing: Preprocessing):
    self.graph, self.preprocessing = graph, preprocessing
    self.shapes = graph.shapes(preprocessing.shape)
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []
    self._shared: set[str] = set()

  def read(self, node: Node, i: int = 0, tensor: str | None = None) -> str:
    """Returns input i as real numbers; `tensor` replaces it, if reshaped."""
    raise NotImplementedError

  def weights(self, node: Node) -> list[str]:
    """Returns the names of weights, [O, I, H, W] or [O, I], and bias, [O]."""
    raise NotImplementedError

  def slopes(self, node: Node) -> np.ndarray:
    """Returns the slopes of a prelu below zero, [C]."""
    raise NotImplementedError

  def write(self, node: Node, real: str) -> None:
    """Writes the output of a layer, with its activation, from `real`."""
    raise NotImplementedError

  def zero(self, node: Node) -> np.generic:
    """Returns the value that stands for 0 in the output of a layer."""
    raise NotImplementedError

  def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Emits every layer and returns the checked model."""
    for node in self.graph.nodes:
      getattr(self, f'_{node.op}')(node)
    shape: list[str | int | None] = ['N', *self.preprocessing.shape]
    images = helper.make_tensor_value_info(_IMAGES, TensorProto.UINT8, shape)
    logits = helper.make_tensor_value_info(_LOGITS, TensorProto.FLOAT, None)
    model = helper.make_model(
      helper.make_graph(
        self.nodes, 'clusterq-jax', [images], [logits], self.constants
      ),
      opset_imports=[helper.make_opsetid('', _OPSET)],
      ir_version=_IR_VERSION,
      producer_name='clusterq-jax',
    )
    helper.set_model_props(model, dict(metadata))
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return model

  def constant(self, name: str, array) -> str:
    """Adds a constant tensor and returns its name."""
    self.constants.append(numpy_helper.from_array(np.asarray(array), name))
    return name

  def shared(self, value) -> str:
    """Returns the name of a constant; equal values share one constant."""
    array = np.asarray(value)
    name = f'{array.dtype}/{array}'
    if name not in self._shared:
      self._shared.add(self.constant(name, array))
    return name

  def node(self, op: str, inputs: list[str], output: str, **attributes) -> str:
    """Adds a node, named like its output, and returns that name."""
    self.nodes.append(
      helper.make_node(op, inputs, [output], name=output, **attributes)
    )
    return output

  def output(self, name: str) -> str:
    """Returns the tensor of a layer; the model's own names are taken."""
    return f'{name}/output' if name in (_IMAGES, _LOGITS) else name

  def source(self, node: Node) -> str:
    """Returns the tensor of a layer's first input."""
    return self.output(node.inputs[0])

  def window(self, node: Node) -> dict[str, Any]:
    """Returns the attributes of a layer with a window."""
    (top, bottom), (left, right) = convolution.explicit(
      self.shapes[node.inputs[0]][:2],
      node.kernel,
      node.strides,
      node.padding,
      node.dilation,
    )
    return {
      'kernel_shape': node.kernel,
      'strides': (node.strides,) * 2,
      'pads': (top, left, bottom, right),
    }

  # --- Layers that compute ---------------------------------------------------

  def _real(self, node: Node, op: str, *more: str, **attributes: Any) -> None:
    """Emits a layer that maps all its inputs, as real numbers, by one node."""
    inputs = [self.read(node, i) for i in range(len(node.inputs))]
    real = self.node(op, [*inputs, *more], f'{node.name}/real', **attributes)
    self.write(node, real)

  def _input(self, node: Node) -> None:
    x = self.node('Transpose', [_IMAGES], 'images/nchw', perm=(0, 3, 1, 2))
    if self.preprocessing.channel_order == 'bgr':
      order = self.constant('images/order', np.array([2, 1, 0]))
      x = self.node('Gather', [x, order], 'images/bgr', axis=1)
    x = self.node('Cast', [x], 'images/float', to=TensorProto.FLOAT)
    gain, offset = (
      self.constant(f'images/{name}', array.reshape(-1, 1, 1))
      for name, array in zip(
        ('gain', 'offset'),
        tables.normalization(self.preprocessing),
        strict=True,
      )
    )
    x = self.node('Mul', [x, gain], 'images/scaled')
    x = self.node('Add', [x, offset], 'images/normalized')
    self.write(node, x)

  def _conv(self, node: Node) -> None:
    self._real(
      node,
      'Conv',
      *self.weights(node),
      **self.window(node),
      dilations=(node.dilation,) * 2,
      group=node.groups,
    )

  _conv_bn = _conv

  def _dense(self, node: Node) -> None:
    flat = self.node('Flatten', [self.source(node)], f'{node.name}/flat')
    inputs = [self.read(node, tensor=flat), *self.weights(node)]
    self.node('Gemm', inputs, _LOGITS, transB=1)

  def _act(self, node: Node) -> None:
    slope: dict[str, Any] = {'alpha': node.slope}
    if node.act == 'prelu':
      rows = self.slopes(node).reshape(-1, 1, 1).astype(np.float32)
      self._real(node, 'PRelu', self.constant(f'{node.name}/slope', rows))
    elif node.act == 'hard_sigmoid':
      self._real(node, 'HardSigmoid', alpha=1 / 6, beta=0.5)
    elif node.act in ('gelu', 'gelu_tanh'):
      kind = 'tanh' if node.act == 'gelu_tanh' else 'none'
      self._real(node, 'Gelu', approximate=kind)
    elif node.act in ('leaky_relu', 'elu'):
      self._real(node, 'Elu' if node.act == 'elu' else 'LeakyRelu', **slope)
    else:
      ops = {'hard_swish': 'HardSwish', 'sigmoid': 'Sigmoid', 'tanh': 'Tanh'}
      self._real(node, ops[str(node.act)])

  def _add(self, node: Node) -> None:
    self._real(node, 'Add')

  def _mul(self, node: Node) -> None:
    self._real(node, 'Mul')

  def _concat(self, node: Node) -> None:
    self._real(node, 'Concat', axis=1)

  def _avg_pool(self, node: Node) -> None:
    count = int(node.count_padding)
    attributes = {**self.window(node), 'count_include_pad': count}
    self._real(node, 'AveragePool', **attributes)

  def _global_avg_pool(self, node: Node) -> None:
    self._real(node, 'GlobalAveragePool')

  # --- Layers that move values -----------------------------------------------

  def _cut(
    self, node: Node, starts: Any, ends: Any, axes: Any, steps: Any, output: str
  ) -> str:
    numbers = {'starts': starts, 'ends': ends, 'axes': axes, 'steps': steps}
    inputs = [
      self.constant(f'{node.name}/{key}', np.array(value))
      for key, value in numbers.items()
    ]
    return self.node('Slice', [self.source(node), *inputs], output)

  def _fill(
    self, node: Node, x: str, before: list[int], after: list[int]
  ) -> None:
    """Pads x with zeros; `before` and `after` have one number per axis."""
    pads = self.constant(f'{node.name}/pads', np.array([*before, *after]))
    value = self.constant(f'{node.name}/value', self.zero(node))
    self.node('Pad', [x, pads, value], self.output(node.name))

  def _slice(self, node: Node) -> None:
    output = self.output(node.name)
    self._cut(node, [node.start], [node.stop], [1], [1], output)

  def _pad_shortcut(self, node: Node) -> None:
    end, steps = 2**31 - 1, [node.strides] * 2
    x = self._cut(node, [0, 0], [end, end], [2, 3], steps, f'{node.name}/slice')
    missing = self.shapes[node.name][2] - self.shapes[node.inputs[0]][2]
    first = missing // 2
    self._fill(node, x, [0, first, 0, 0], [0, missing - first, 0, 0])

  def _pad(self, node: Node) -> None:
    (top, bottom), (left, right) = convolution.explicit(
      (0, 0), (1, 1), 1, node.padding
    )
    before, after = [0, 0, top, left], [0, 0, bottom, right]
    self._fill(node, self.source(node), before, after)

  def _shuffle(self, node: Node) -> None:
    h, w, c = self.shapes[node.name]
    x = self.source(node)
    split = [_FIRST_SIZE, node.groups, c // node.groups, h, w]
    steps = {'split': split, 'joined': [_FIRST_SIZE, c, h, w]}
    split_name, joined = (
      self.constant(f'{node.name}/{key}', np.array(value))
      for key, value in steps.items()
    )
    x = self.node('Reshape', [x, split_name], f'{node.name}/groups')
    x = self.node('Transpose', [x], f'{node.name}/turned', perm=(0, 2, 1, 3, 4))
    self.node('Reshape', [x, joined], self.output(node.name))

  def _resize(self, node: Node) -> None:
    scales = np.array([1, 1, node.factor, node.factor], np.float32)
    self.node(
      'Resize',
      [self.source(node), '', self.constant(f'{node.name}/scales', scales)],
      self.output(node.name),
      mode='nearest',
      coordinate_transformation_mode='asymmetric',
      nearest_mode='floor',
    )

  def _max_pool(self, node: Node) -> None:
    self.node(
      'MaxPool',
      [self.source(node)],
      self.output(node.name),
      **self.window(node),
    )
