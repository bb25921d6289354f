"""Tests every op: student, integer network, ONNX models and their kernels.

All ops are branches of one network, so that each program is compiled once.
"""

import collections
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from clusterq_jax.deploy import fold
from clusterq_jax.layers import fake_quant
from clusterq_jax.models import network as network_lib
from clusterq_jax.models.graph import Graph, Node
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import plan as plan_lib

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
onnx_graph = pytest.importorskip('clusterq_jax.deploy.onnx_graph')
pytestmark = pytest.mark.usefixtures('optimized')

_SHAPE = (8, 8, 3)
_CHANNELS = 8
_PREPROCESSING = Preprocessing((8, 8), (0.4, 0.45, 0.5), (0.2, 0.25, 0.3))


class _Op(NamedTuple):
  """What is expected of an op.

  Attributes:
    nodes: layers, the tested one last. They may read `signed` and `unsigned`
      maps [8, 8, 8], the `gate` [1, 1, 8] and each other.
    kernel: ONNX Runtime's kernel that computes the output; None if the values
      only move.
    exact: whether codes equal ONNX Runtime's. Otherwise they may differ by one.
  """

  nodes: tuple[Node, ...]
  kernel: str | None
  exact: bool = True


def _conv(op='conv_bn', source='signed', **options):
  options = {'features': _CHANNELS, 'kernel': (3, 3), **options}
  node = Node('', op, (source,), **options)
  return _Op((node,), 'QLinearConv')


def _act(act, kernel, source='signed'):
  node = Node('', 'act', (source,), act=act, slope=0.3)
  return _Op((node,), kernel, exact=kernel.startswith('QLinear'))


def _op(op, runs, *sources, **options):
  return _Op((Node('', op, sources, **options),), runs)


_SIDE = {'kernel': (3, 3), 'strides': 2}
_UNEVEN = ((0, 1), (2, 0))
# Op -> layers, kernel of ONNX Runtime, whether bit-exact.
_OPS: dict[str, _Op] = {
  'conv_bn': _conv(act='relu6'),
  'conv': _conv('conv', act='relu'),
  'conv_rectangular': _conv(kernel=(1, 5)),
  'conv_dilated': _conv(dilation=2, act='relu'),
  'conv_uneven': _conv(strides=2, padding=_UNEVEN),
  'conv_same': _conv(strides=2, padding='same'),
  'conv_depthwise': _conv(groups=8, strides=2, padding=((0, 1), (0, 1))),
  'conv_grouped': _conv(groups=2, source='unsigned'),
  'batch_norm': _conv(kernel=(1, 1), groups=8, act='relu'),
  'affine': _conv('conv', kernel=(1, 1), groups=8),
  'hidden_dense': _conv('conv', kernel=(8, 8), padding=0, act='relu'),
  'dense_on_vector': _conv('conv', 'gate', kernel=(1, 1)),
  'relu': _act('relu', 'QuantizeLinear')._replace(exact=True),
  'relu6': _act('relu6', 'QuantizeLinear')._replace(exact=True),
  'relu_of_relu': _act('relu', 'QuantizeLinear', 'unsigned'),
  'leaky_relu': _act('leaky_relu', 'QLinearLeakyRelu'),
  'sigmoid': _act('sigmoid', 'QLinearSigmoid'),
  'hard_sigmoid': _act('hard_sigmoid', 'HardSigmoid'),
  'hard_swish': _act('hard_swish', 'HardSwish'),
  'gelu': _act('gelu', 'Gelu'),
  'gelu_tanh': _act('gelu_tanh', 'Gelu'),
  'elu': _act('elu', 'Elu'),
  'tanh': _act('tanh', 'Tanh'),
  'prelu': _act('prelu', 'PRelu'),
  'add': _op('add', 'QLinearAdd', 'signed', 'unsigned', act='relu'),
  'add_gate': _op('add', 'QLinearAdd', 'signed', 'gate'),
  'add_gate_first': _op('add', 'QLinearAdd', 'gate', 'unsigned', act='relu6'),
  'mul': _op('mul', 'QLinearMul', 'signed', 'unsigned'),
  'mul_square': _op('mul', 'QLinearMul', 'signed', 'signed'),
  'mul_gate': _op('mul', 'QLinearMul', 'signed', 'gate'),
  'mul_gate_first': _op('mul', 'QLinearMul', 'gate', 'unsigned'),
  'silu': _Op(
    (
      Node('sigmoid', 'act', ('signed',), act='sigmoid'),
      Node('', 'mul', ('signed', 'sigmoid')),
    ),
    'QLinearMul',
  ),
  'concat': _Op(  # of layers that nothing else reads
    (
      Node('a', 'conv', ('signed',), features=4, act='relu6'),
      Node('b', 'conv', ('signed',), features=4),
      Node('inner', 'concat', ('a', 'b')),
      Node('moved', 'max_pool', ('inner',), kernel=(3, 3)),
      Node('c', 'act', ('signed',), act='relu'),
      Node('', 'concat', ('c', 'moved')),
    ),
    'Concat',
  ),
  'concat_unsigned': _Op(
    (
      Node('a', 'conv', ('signed',), features=4, act='relu6'),
      Node('b', 'act', ('signed',), act='sigmoid'),
      Node('', 'concat', ('a', 'b')),
    ),
    'Concat',
  ),
  'concat_requantized': _Op(
    (
      Node('a', 'conv', ('signed',), features=4, act='relu'),
      Node('', 'concat', ('unsigned', 'signed', 'a')),
    ),
    'QLinearConcat',
  ),
  'slice': _op('slice', None, 'signed', start=1, stop=6),
  'shuffle': _op('shuffle', None, 'signed', groups=4),
  'pad': _op('pad', None, 'signed', padding=((1, 0), (2, 3))),
  'pad_shortcut': _op('pad_shortcut', None, 'signed', strides=2, features=11),
  'resize': _op('resize', None, 'signed', factor=2),
  'max_pool': _op('max_pool', None, 'signed', padding=_UNEVEN, **_SIDE),
  'pad_and_max_pool': _Op(
    (
      Node('pad', 'pad', ('signed',), padding=_UNEVEN),
      Node('', 'max_pool', ('pad',), kernel=(3, 3), padding=0),
    ),
    None,
  ),
  'avg_pool': _op('avg_pool', 'QLinearConv', 'signed', padding=0, **_SIDE),
  'avg_pool_counting': _op(
    'avg_pool', 'QLinearConv', 'signed', count_padding=True, **_SIDE
  ),
  'avg_pool_padded': _op('avg_pool', 'QLinearAveragePool', 'signed', **_SIDE),
  'avg_pool_uneven': _op(
    'avg_pool', 'QLinearAveragePool', 'unsigned', padding=_UNEVEN, **_SIDE
  ),
  'global_avg_pool': _op(
    'global_avg_pool', 'QLinearGlobalAveragePool', 'signed'
  ),
}


def _graph() -> Graph:
  """Returns a network with every op; a 1x1 convolution reads each."""
  nodes = [
    Node('images', 'input', ()),  # a name of the ONNX models
    Node('signed', 'conv_bn', ('images',), features=_CHANNELS, kernel=(3, 3)),
    Node('unsigned', 'conv', ('signed',), features=_CHANNELS, act='relu'),
    Node('squeeze', 'global_avg_pool', ('unsigned',)),
    Node('gate', 'conv', ('squeeze',), features=_CHANNELS),
  ]
  shared = {node.name for node in nodes}
  ends = []
  for name, op in _OPS.items():

    def renamed(inner, name=name):
      return inner if inner in shared else f'{name}.{inner}'.rstrip('.')

    nodes += [
      node.__class__(
        **{
          **vars(node),
          'name': renamed(node.name),
          'inputs': tuple(map(renamed, node.inputs)),
        }
      )
      for node in op.nodes
    ]
    nodes.append(Node(f'{name}.read', 'conv', (name,), features=2))
    nodes.append(Node(f'{name}.pool', 'global_avg_pool', (f'{name}.read',)))
    ends.append(f'{name}.pool')
  nodes.append(Node('logits', 'concat', tuple(ends)))
  nodes.append(Node('classifier', 'dense', ('logits',), features=5))
  return Graph(tuple(nodes), _SHAPE)


def _variables(graph: Graph) -> Any:
  """Returns random variables, with gains of both signs."""
  random = np.random.RandomState(0)

  def value(key, shape):
    array = random.randn(*shape)
    if key == 'kernel':
      array *= np.sqrt(2 / np.prod(shape[:-1]))
    elif key in ('var', 'scale'):
      array = random.uniform(0.5, 1.5, shape)
      array *= random.choice([-1, 1], shape) if key == 'scale' else 1
    else:
      array *= 0.3
    return array.astype(np.float32)

  return {
    kind: {
      name: {key: value(key, shape) for key, shape in leaves.items()}
      for name, leaves in layers.items()
    }
    for kind, layers in graph.variable_shapes().items()
  }


class _Case(NamedTuple):
  """One student in three forms, on the same images.

  Attributes:
    ours: codes of each layer from JAX, [N, H, W, C], and the logits.
    theirs: the same from ONNX Runtime.
    fake: logits of the fake-quantized student.
    makers: operator and domain by tensor, in ONNX Runtime's optimized model.
    counts: number of operators in it.
  """

  ours: dict[str, np.ndarray]
  theirs: dict[str, np.ndarray]
  fake: np.ndarray
  kernels: dict[str, str]
  counts: collections.Counter[str]


def _session(model, file=None):
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  options.log_severity_level = 3
  # Exact on CPUs without VNNI as well.
  options.add_session_config_entry('session.x64quantprecision', '1')
  if file is not None:
    options.optimized_model_filepath = str(file)
  return onnxruntime.InferenceSession(
    model.SerializeToString(), options, providers=['CPUExecutionProvider']
  )


def _images(seed, count):
  random = np.random.RandomState(seed)
  return random.randint(0, 256, (count, *_SHAPE)).astype(np.uint8)


@pytest.fixture(scope='module')
def case(tmp_path_factory):
  """Returns the case of (bits, learned)."""
  graph = _graph()
  float_variables = _variables(graph)
  x = _PREPROCESSING.normalize(_images(0, 16))

  @functools.cache
  def make(bits: int, learned: bool) -> _Case:
    chosen = plan_lib.Bits(bits, bits, bits, bits, 'integer')
    plan = plan_lib.make_plan(graph, chosen, learned, _PREPROCESSING.limit)
    build = network_lib.builder(graph)
    calibrate = build(fake_quant.layer_set(plan, calibrate=True)).apply
    _, quant = jax.jit(functools.partial(calibrate, mutable=['quant']))(
      float_variables, x
    )
    variables = {**float_variables, **jax.device_get(quant)}
    folded = fold.fold(graph, plan, variables, _PREPROCESSING)
    images = _images(1, 64)
    student = build(fake_quant.layer_set(plan))
    fake = jax.jit(student.apply)(variables, _PREPROCESSING.normalize(images))
    ours = jax.device_get(jax.jit(folded.outputs)(images))

    model = onnx_graph.integer_model(folded, {})
    file = tmp_path_factory.mktemp('ops') / 'optimized.onnx'
    _session(model, file)
    nodes = onnx.load(file).graph.node
    kernels = {output: n.op_type for n in nodes for output in n.output}
    # The outputs of all layers, from the same file.
    names = [n.name for n in graph.nodes[1:-1] if n.name != 'logits']
    for name in names:
      kind = onnx.TensorProto.UINT8
      model.graph.output.append(
        onnx.helper.make_tensor_value_info(name, kind, None)
      )
    found = _session(model).run(['logits', *names], {'images': images})
    theirs = {
      name: array.transpose(0, 2, 3, 1)
      for name, array in zip(names, found[1:], strict=True)
    }
    theirs['classifier'] = found[0]
    counts = collections.Counter(node.op_type for node in nodes)
    return _Case(ours, theirs, np.asarray(fake), kernels, counts)

  return make


_BITS = pytest.mark.parametrize(
  ('bits', 'learned'),
  [(4, True), pytest.param(8, False, marks=pytest.mark.slow)],
)
