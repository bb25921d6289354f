"""Builds the ONNX models of a network from the graph of its architecture.

The integer model is in QDQ format, opset 21. Every tensor is uint8 between
QuantizeLinear and DequantizeLinear. A Clip on integers narrows tensors of fewer
than 8 bits. Weights of up to 4 bits are stored as INT4. An average pool over
windows is a depthwise convolution with ones, because ONNX Runtime's
QLinearAveragePool adds floats. ONNX Runtime fuses the nodes into QLinearConv,
QLinearAdd, QLinearGlobalAveragePool and QGemm.

Both models map `images`, uint8 [N, H, W, C] in RGB, to `logits`, float32
[N, K]. They contain the normalisation of the input.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clusterq_jax.deploy import fold, integer
from clusterq_jax.layers import float_layers
from clusterq_jax.models.graph import Graph, Node
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.ops import convolution

_OPSET, _IR_VERSION = 21, 10
_INT4_HIGH = 7


def integer_model(
  network: integer.IntegerNetwork, metadata: Mapping[str, str]
) -> onnx.ModelProto:
  """Builds the model that gives the same logits as `network.logits`.

  Args:
    network: result of `fold.fold`.
    metadata: strings to store in the file.
  """
  return _Integer(network).model(metadata)


def float_model(
  graph: Graph,
  variables: Mapping[str, Any],
  preprocessing: Preprocessing,
  metadata: Mapping[str, str],
) -> onnx.ModelProto:
  """Builds the float32 model, with BatchNorm folded into the weights.

  Args:
    graph: graph of the architecture.
    variables: {'params', 'batch_stats'}.
    preprocessing: preprocessing that the weights expect.
    metadata: strings to store in the file.
  """
  return _Float(graph, variables, preprocessing).model(metadata)


class _Emitter:
  """Emitter of ONNX nodes for the layers of a graph.

  The output tensor of a layer has the layer's name. Subclasses define how a
  layer reads an input, what its weights are, and how it writes its output.
  """

  graph: Graph
  preprocessing: Preprocessing

  def __init__(self):
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []

  def read(self, node: Node, i: int = 0, tensor: str | None = None) -> str:
    """Returns input i as real numbers; `tensor` replaces it, if reshaped."""
    raise NotImplementedError

  def weights(self, node: Node) -> list[str]:
    """Returns the names of weights, [O, I, H, W] or [O, I], and bias, [O]."""
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
    images = helper.make_tensor_value_info('images', TensorProto.UINT8, shape)
    logits = helper.make_tensor_value_info('logits', TensorProto.FLOAT, None)
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

  def _shared(self, value) -> str:
    """Returns the name of a constant; equal values share one constant."""
    array = np.asarray(value)
    name = f'{array.dtype}/{array}'
    if all(constant.name != name for constant in self.constants):
      self.constant(name, array)
    return name

  def node(self, op: str, inputs: list[str], output: str, **attributes) -> str:
    """Adds a node and returns the name of its output."""
    self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
    return output

  def _input(self, node: Node) -> None:
    preprocessing = self.preprocessing
    x = self.node('Transpose', ['images'], 'images/nchw', perm=(0, 3, 1, 2))
    if preprocessing.channel_order == 'bgr':
      order = self.constant('images/order', np.array([2, 1, 0]))
      x = self.node('Gather', [x, order], 'images/bgr', axis=1)
    x = self.node('Cast', [x], 'images/float', to=TensorProto.FLOAT)
    gain, offset = (
      self.constant(f'images/{name}', array.reshape(-1, 1, 1))
      for name, array in zip(
        ('gain', 'offset'), fold.normalization(preprocessing), strict=True
      )
    )
    x = self.node('Mul', [x, gain], 'images/scaled')
    x = self.node('Add', [x, offset], 'images/normalized')
    self.write(node, x)

  def _conv_bn(self, node: Node) -> None:
    inputs = [self.read(node), *self.weights(node)]
    real = self.node(
      'Conv',
      inputs,
      f'{node.name}/real',
      strides=(node.strides, node.strides),
      **_padding(node),
      group=node.groups,
    )
    self.write(node, real)

  def _dense(self, node: Node) -> None:
    flat = self.node('Flatten', [node.inputs[0]], f'{node.name}/flat')
    inputs = [self.read(node, tensor=flat), *self.weights(node)]
    self.node('Gemm', inputs, 'logits', transB=1)

  def _add(self, node: Node) -> None:
    inputs = [self.read(node, i) for i in (0, 1)]
    self.write(node, self.node('Add', inputs, f'{node.name}/real'))

  def _global_avg_pool(self, node: Node) -> None:
    pooled = [self.read(node)]
    self.write(
      node, self.node('GlobalAveragePool', pooled, f'{node.name}/real')
    )

  def _pad_shortcut(self, node: Node) -> None:
    """Slices and pads the input itself: codes remain codes."""
    name, strides = node.name, node.strides
    ends = {'starts': [0, 0], 'ends': [2**31 - 1] * 2, 'axes': [2, 3]}
    ends['steps'] = [strides, strides]
    slices = [
      self.constant(f'{name}/{key}', np.array(value))
      for key, value in ends.items()
    ]
    x = self.node('Slice', [node.inputs[0], *slices], f'{name}/slice')
    missing = self.graph.channels(name) - self.graph.channels(node.inputs[0])
    before = missing // 2
    pads = np.array([0, before, 0, 0, 0, missing - before, 0, 0])
    inputs = [x, self.constant(f'{name}/pads', pads)]
    inputs.append(self.constant(f'{name}/value', self.zero(node)))
    self.node('Pad', inputs, name)

  def _max_pool(self, node: Node) -> None:
    """Pools the input itself: codes remain codes."""
    self.node(
      'MaxPool',
      [node.inputs[0]],
      node.name,
      kernel_shape=node.kernel,
      strides=(node.strides,) * 2,
      **_padding(node),
    )


class _Float(_Emitter):
  def __init__(self, graph, variables, preprocessing):
    super().__init__()
    self.graph, self.preprocessing = graph, preprocessing
    self.variables = variables

  def read(self, node, i=0, tensor=None):
    return tensor or node.inputs[i]

  def write(self, node, real):
    if node.act == 'relu6':
      ends = [self._shared(np.float32(end)) for end in (0, float_layers.RELU6)]
      self.node('Clip', [real, *ends], node.name)
    else:
      op = 'Relu' if node.act == 'relu' else 'Identity'
      self.node(op, [real], node.name)

  def weights(self, node):
    kernel, gain, bias = fold.fold_batch_norm(self.variables, node)
    return [
      self.constant(
        f'{node.name}/weight', _transposed((kernel * gain).astype(np.float32))
      ),
      self.constant(f'{node.name}/bias', bias.astype(np.float32)),
    ]

  def zero(self, node):
    return np.float32(0)

  def _avg_pool(self, node):
    real = self.node(
      'AveragePool',
      [self.read(node)],
      f'{node.name}/real',
      kernel_shape=node.kernel,
      strides=(node.strides,) * 2,
    )
    self.write(node, real)


class _Integer(_Emitter):
  def __init__(self, network: integer.IntegerNetwork):
    super().__init__()
    self.graph, self.preprocessing = network.graph, network.preprocessing
    self.layers = network.layers
    for name, layer in network.layers.items():
      if layer.grid is not None:
        self.constant(f'{name}/step', layer.grid.step)
        self.constant(f'{name}/zero', np.uint8(layer.grid.zero))

  def read(self, node, i=0, tensor=None):
    source = node.inputs[i]
    return self.node(
      'DequantizeLinear',
      [tensor or source, f'{source}/step', f'{source}/zero'],
      f'{node.name}/{i}',
    )

  def write(self, node, real):
    # The ends of the grid clip like the activation, so it needs no node.
    name, grid = node.name, self.layers[node.name].grid
    assert grid is not None
    ends = [grid.low, grid.high]
    full = ends == [0, 255]
    inputs = [real, f'{name}/step', f'{name}/zero']
    codes = self.node('QuantizeLinear', inputs, name if full else f'{name}/q')
    if not full:
      self.node(
        'Clip', [codes, *(self._shared(np.uint8(e)) for e in ends)], name
      )

  def weights(self, node):
    name, layer = node.name, self.layers[node.name]
    assert layer.weights is not None
    step = layer.weights.step
    bias_step = layer.sources[0].step * step
    weight = [
      self._weight_codes(name, layer.weights),
      self.constant(f'{name}/w/step', step),
    ]
    if node.op == 'dense':  # ONNX Runtime's QGemm requires a zero point
      weight.append(
        self.constant(f'{name}/w/zero', np.zeros(len(step), np.int8))
      )
    bias = [
      self.constant(f'{name}/b', layer.weights.bias),
      self.constant(f'{name}/b/step', bias_step),
    ]
    return [
      self.node('DequantizeLinear', inputs, f'{name}/{what}/real', axis=0)
      for what, inputs in (('w', weight), ('b', bias))
    ]

  def _weight_codes(self, name: str, weights: integer.Weights) -> str:
    """Stores small codes as INT4 and returns the name of the int8 codes.

    The runtime multiplies them by `weights.factor` once, when it loads the
    file. A DequantizeLinear directly on INT4 would run in float.
    """
    stored = f'{name}/w'
    codes = _transposed(weights.codes)
    small = codes // weights.factor
    if np.abs(small).max() > _INT4_HIGH:
      return self.constant(stored, codes)
    x = self.constant(f'{stored}/4', small.astype(ml_dtypes.int4))
    x = self.node('Cast', [x], f'{stored}/32', to=TensorProto.INT32)
    x = self.node(
      'Mul', [x, self._shared(np.int32(weights.factor))], f'{stored}/x'
    )
    return self.node('Cast', [x], stored, to=TensorProto.INT8)

  def zero(self, node):
    grid = self.layers[node.name].grid
    assert grid is not None
    return np.uint8(grid.zero)

  def _avg_pool(self, node):
    name, channels = node.name, self.graph.channels(node.name)
    ones = np.ones((channels, 1, *node.kernel), np.int8)
    weight = [
      self.constant(f'{name}/w', ones),
      self.constant(f'{name}/w/step', integer.window_share(node)),
    ]
    inputs = [
      self.read(node),
      self.node('DequantizeLinear', weight, f'{name}/w/real'),
    ]
    real = self.node(
      'Conv',
      inputs,
      f'{name}/real',
      strides=(node.strides,) * 2,
      group=channels,
    )
    self.write(node, real)


def _padding(node: Node) -> dict[str, Any]:
  if node.padding == 'same':
    return {'auto_pad': 'SAME_UPPER'}
  (top, bottom), (left, right) = convolution.explicit(
    (0, 0), node.kernel, node.strides, node.padding, node.dilation
  )
  return {'pads': (top, left, bottom, right)}


def _transposed(kernel: np.ndarray) -> np.ndarray:
  """Transposes a kernel from HWIO to OIHW, or from IO to OI."""
  return kernel.transpose((3, 2, 0, 1) if kernel.ndim == 4 else (1, 0))
