"""Builds the ONNX models of a network from the graph of its architecture.

The integer model is in QDQ format, opset 21. Every tensor is uint8 between
QuantizeLinear and DequantizeLinear. A Clip on integers narrows tensors of fewer
than 8 bits. Weights of up to 4 bits are stored as INT4. An average pool over
windows is a depthwise convolution with ones, because ONNX Runtime's
QLinearAveragePool adds floats. Only a pool that leaves padded zeros out cannot
be one. ONNX Runtime fuses the nodes into QLinearConv, QLinearAdd, QLinearMul,
QLinearGlobalAveragePool, QGemm and others. Most activations remain in float
between two grids.

Both models map `images`, uint8 [N, H, W, C] in RGB, to `logits`, float32
[N, K]. They contain the normalisation of the input.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from clusterq_jax.deploy import fold, integer
from clusterq_jax.deploy.onnx_emitter import Emitter
from clusterq_jax.layers import functions
from clusterq_jax.models import protocol
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.preprocessing import Preprocessing

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


class _Float(Emitter):
  def __init__(self, graph, variables, preprocessing):
    super().__init__(graph, preprocessing)
    self.variables = variables

  def read(self, node, i=0, tensor=None):
    return tensor or self.output(node.inputs[i])

  def write(self, node, real):
    self._clip(node, real, self.output(node.name))

  def _clip(self, node, x, output):
    if node.act == 'relu6':
      ends = [self.shared(np.float32(end)) for end in (0, functions.RELU6)]
      self.node('Clip', [x, *ends], output)
    else:
      self.node('Relu' if node.act == 'relu' else 'Identity', [x], output)

  def weights(self, node):
    kernel, gain, bias = fold.fold_batch_norm(self.variables, node)
    return [
      self.constant(
        f'{node.name}/weight', _transposed((kernel * gain).astype(np.float32))
      ),
      self.constant(f'{node.name}/bias', bias.astype(np.float32)),
    ]

  def slopes(self, node):
    return np.asarray(self.variables['params'][node.name]['slope'])

  def zero(self, node):
    return np.float32(0)

  def _act(self, node):
    if node.act in protocol.CLIPPING:
      self.write(node, self.read(node))
    else:
      super()._act(node)


class _Integer(Emitter):
  def __init__(self, network: integer.IntegerNetwork):
    super().__init__(network.graph, network.preprocessing)
    self.layers = network.layers
    for name, layer in network.layers.items():
      if layer.grid is not None:
        self.constant(f'{name}/step', layer.grid.step)
        self.constant(f'{name}/zero', np.uint8(layer.grid.zero))

  def read(self, node, i=0, tensor=None):
    source = node.inputs[i]
    return self.node(
      'DequantizeLinear',
      [tensor or self.output(source), f'{source}/step', f'{source}/zero'],
      f'{node.name}/{i}',
    )

  def write(self, node, real):
    # The ends of the grid clip like the activation, so it needs no node.
    name, grid = node.name, self.layers[node.name].grid
    assert grid is not None
    ends = [grid.low, grid.high]
    full = ends == [0, 255]
    inputs = [real, f'{name}/step', f'{name}/zero']
    output = self.output(name)
    codes = self.node('QuantizeLinear', inputs, output if full else f'{name}/q')
    if not full:
      self._clip(codes, ends, output)

  def _clip(self, codes: str, ends: list[int], output: str) -> str:
    inputs = [codes, *(self.shared(np.uint8(end)) for end in ends)]
    return self.node('Clip', inputs, output)

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
      'Mul', [x, self.shared(np.int32(weights.factor))], f'{stored}/x'
    )
    return self.node('Cast', [x], stored, to=TensorProto.INT8)

  def zero(self, node):
    grid = self.layers[node.name].grid
    assert grid is not None
    return np.uint8(grid.zero)

  def slopes(self, node):
    slopes = self.layers[node.name].slopes
    assert slopes is not None
    return slopes

  def _act(self, node):
    if node.act not in protocol.CLIPPING:
      super()._act(node)
      return
    # The codes clip. With nothing between two pairs of QuantizeLinear and
    # DequantizeLinear, the runtime would merge them and round only once.
    grid = self.layers[node.name].sources[0]
    ends = [grid.zero, 255]
    positive = self._clip(self.source(node), ends, f'{node.name}/positive')
    self.write(node, self.read(node, tensor=positive))

  def _concat(self, node):
    if self.layers[node.name].table is not None:
      super()._concat(node)
    else:
      inputs = list(map(self.output, node.inputs))
      self.node('Concat', inputs, self.output(node.name), axis=1)

  def _avg_pool(self, node):
    if not integer.counts_all(node):
      super()._avg_pool(node)
      return
    name, channels = node.name, self.shapes[node.name][2]
    ones = np.ones((channels, 1, *node.kernel), np.int8)
    weight = [
      self.constant(f'{name}/w', ones),
      self.constant(f'{name}/w/step', integer.window_share(node)),
    ]
    kernel = self.node('DequantizeLinear', weight, f'{name}/w/real')
    self._real(node, 'Conv', kernel, **self.window(node), group=channels)


def _transposed(kernel: np.ndarray) -> np.ndarray:
  """Transposes a kernel from HWIO to OIHW, or from IO to OI."""
  return kernel.transpose((3, 2, 0, 1) if kernel.ndim == 4 else (1, 0))
