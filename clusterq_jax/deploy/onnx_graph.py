"""Writes a network as an ONNX graph, from the architecture's own wiring.

    integer_model   for runtimes that execute integers; the tensors are `fold`'s
    float_model     its float32 twin, of the teacher

The integer file is QDQ, opset 21: every tensor is uint8 between a
QuantizeLinear and its DequantizeLinears; an integer Clip narrows it where it
has fewer than 8 bits; weights of up to 4 bits are stored as INT4. ONNX Runtime
turns it into QLinearConv, QLinearAdd, QLinearGlobalAveragePool and QGemm. The
average of windows is a depthwise convolution with ones: QLinearAveragePool adds
floats.

Both models take `images` uint8 [N, H, W, C], RGB, and give `logits` float32
[N, K]: the input's normalisation is inside.
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

_OPSET, _IR_VERSION = 21, 10
_INT4_HIGH = 7


def integer_model(
  network: integer.IntegerNetwork, metadata: Mapping[str, str]
) -> onnx.ModelProto:
  """Writes the integer network, which gives the logits of `network.logits`.

  Args:
    network: from `fold.fold`.
    metadata: stored in the file.
  """
  return _Integer(network).model(metadata)


def float_model(
  graph: Graph,
  variables: Mapping[str, Any],
  preprocessing: Preprocessing,
  metadata: Mapping[str, str],
) -> onnx.ModelProto:
  """The float network, BatchNorm folded into the weights.

  Args:
    graph: the wiring.
    variables: {'params', 'batch_stats'}.
    preprocessing: what the weights expect.
    metadata: stored in the file.
  """
  return _Float(graph, variables, preprocessing).model(metadata)


class _Emitter:
  """Walks a graph; a tensor is called as the layer that made it.

  What differs between float and integer networks is how a layer reads an
  input, what its weights are, and how it writes its output.
  """

  graph: Graph
  preprocessing: Preprocessing

  def __init__(self):
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []

  def read(self, node: Node, i: int = 0, tensor: str | None = None) -> str:
    """Input i of a layer as real numbers; `tensor` holds it, if moved."""
    raise NotImplementedError

  def weights(self, node: Node) -> list[str]:
    """Weights [O, I, H, W] or [O, I] and bias [O], as real numbers."""
    raise NotImplementedError

  def write(self, node: Node, real: str) -> None:
    """A layer's output, activation included, from real numbers."""
    raise NotImplementedError

  def zero(self, node: Node) -> np.generic:
    """Zero, as the tensor that a layer writes has it."""
    raise NotImplementedError

  def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
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
    self.constants.append(numpy_helper.from_array(np.asarray(array), name))
    return name

  def _shared(self, value) -> str:
    """A constant by its value: one for all who need it."""
    array = np.asarray(value)
    name = f'{array.dtype}/{array}'
    if all(constant.name != name for constant in self.constants):
      self.constant(name, array)
    return name

  def node(self, op: str, inputs: list[str], output: str, **attributes) -> str:
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
    """On the tensor as it is: codes stay codes."""
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
    """Likewise."""
    self.node(
      'MaxPool',
      [node.inputs[0]],
      node.name,
      kernel_shape=(node.kernel,) * 2,
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
      kernel_shape=(node.kernel,) * 2,
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
    # An activation is where the grid ends.
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
    if node.op == 'dense':  # ONNX Runtime's QGemm asks for it
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
    """Small codes as INT4 times a factor: folded when the file is loaded.

    INT4 straight into DequantizeLinear would run in float.
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
    ones = np.ones((channels, 1, node.kernel, node.kernel), np.int8)
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
  side = node.kernel // 2 if node.padding is None else node.padding
  return {'pads': (side,) * 4}


def _transposed(kernel: np.ndarray) -> np.ndarray:
  """HWIO to OIHW, or IO to OI."""
  return kernel.transpose((3, 2, 0, 1) if kernel.ndim == 4 else (1, 0))
