"""Tests every op: student, integer network, ONNX models and their kernels.

All ops are branches of one network, so that each program is compiled once.
"""

import contextlib
import copy
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.export  # `import jax` does not load it
import numpy as np
import pytest

from clusterq_jax.deploy import fold, integer
from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.models import network as network_lib
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.node import Node
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import numerics, quantizers
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
    nodes: layers, the tested one last. They may read the maps `signed`,
      `unsigned` and `wide` (8 bits), the `gate`, a vector, and each other.
    kernel: ONNX Runtime's kernel.
    exact: whether codes equal ONNX Runtime's. Otherwise they may differ by one.
  """

  nodes: tuple[Node, ...]
  kernel: str
  exact: bool = True


def _conv(op='conv_bn', source='signed', **options):
  options = {'features': _CHANNELS, 'kernel': (3, 3), **options}
  node = Node('', op, (source,), **options)
  return _Op((node,), 'QLinearConv')


def _act(act, kernel, source='wide'):
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
  'hard_swish': _act('hard_swish', 'QuantizeLinear'),
  'gelu': _act('gelu', 'Gelu'),
  'gelu_tanh': _act('gelu_tanh', 'Gelu'),
  'elu': _act('elu', 'Elu'),
  'tanh': _act('tanh', 'Tanh'),
  'prelu': _act('prelu', 'PRelu'),
  'add': _op('add', 'QLinearAdd', 'signed', 'unsigned', act='relu'),
  'add_gate': _op('add', 'QLinearAdd', 'wide', 'gate'),
  'add_gate_first': _op('add', 'QLinearAdd', 'gate', 'unsigned', act='relu6'),
  'mul': _op('mul', 'QLinearMul', 'wide', 'unsigned'),
  'mul_square': _op('mul', 'QLinearMul', 'wide', 'wide'),
  'mul_gate': _op('mul', 'QLinearMul', 'wide', 'gate'),
  'mul_gate_first': _op('mul', 'QLinearMul', 'gate', 'unsigned'),
  'silu': _Op(
    (
      Node('sigmoid', 'act', ('wide',), act='sigmoid'),
      Node('', 'mul', ('wide', 'sigmoid')),
    ),
    'QLinearMul',
  ),
  'concat': _Op(  # of layers that nothing else reads
    (
      Node('a', 'conv', ('signed',), features=4, act='relu6'),
      Node('b', 'conv', ('signed',), features=4),
      Node('inner', 'concat', ('a', 'b')),
      Node('moved', 'max_pool', ('inner',), kernel=(3, 3)),
      Node('c', 'act', ('wide',), act='relu'),
      Node('d', 'act', ('wide',), act='hard_swish'),
      Node('e', 'mul', ('wide', 'unsigned')),
      Node('f', 'avg_pool', ('unsigned',), kernel=(3, 3)),
      Node('', 'concat', ('c', 'moved', 'd', 'e', 'f')),
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
  'concat_vectors': _Op(
    (
      Node('a', 'global_avg_pool', ('unsigned',)),
      Node('b', 'global_avg_pool', ('wide',)),
      Node('', 'concat', ('a', 'b')),
    ),
    'Concat',
  ),
  'concat_requantized': _Op(
    (
      Node('a', 'conv', ('signed',), features=4, act='relu'),
      Node('', 'concat', ('unsigned', 'wide', 'a')),
    ),
    'QLinearConcat',
  ),
  'slice': _op('slice', 'Slice', 'signed', start=1, stop=6),
  'shuffle': _op('shuffle', 'Transpose', 'signed', groups=4),
  'pad': _op('pad', 'Pad', 'signed', padding=((1, 0), (2, 3))),
  'pad_shortcut': _op('pad_shortcut', 'Pad', 'signed', strides=2, features=11),
  'resize': _op('resize', 'Resize', 'signed', factor=2),
  'max_pool': _op(
    'max_pool', 'NhwcMaxPool', 'signed', padding=_UNEVEN, **_SIDE
  ),
  'pad_and_max_pool': _Op(
    (
      Node('pad', 'pad', ('signed',), padding=_UNEVEN),
      Node('', 'max_pool', ('pad',), kernel=(3, 3), padding=0),
    ),
    'NhwcMaxPool',
  ),
  'avg_pool': _op('avg_pool', 'QLinearConv', 'signed', padding=0, **_SIDE),
  'avg_pool_counting': _op(
    'avg_pool', 'QLinearConv', 'signed', count_padding=True, **_SIDE
  ),
  'avg_pool_padded': _op('avg_pool', 'QLinearAveragePool', 'wide', **_SIDE),
  'avg_pool_uneven': _op(
    'avg_pool', 'QLinearAveragePool', 'unsigned', padding=_UNEVEN, **_SIDE
  ),
  'global_avg_pool': _op(
    'global_avg_pool', 'QLinearGlobalAveragePool', 'signed'
  ),
}


def _graph() -> Graph:
  """Returns a network with every op; a convolution to a vector reads each."""
  nodes = [
    Node('images', 'input', ()),  # a name of the ONNX models
    Node('signed', 'conv_bn', ('images',), features=_CHANNELS, kernel=(3, 3)),
    Node('wide', 'conv', ('images',), features=_CHANNELS),
    Node('unsigned', 'conv', ('signed',), features=_CHANNELS, act='relu'),
    Node('squeeze', 'global_avg_pool', ('unsigned',)),
    Node('gate', 'conv', ('squeeze',), features=_CHANNELS),
  ]
  shared = {node.name for node in nodes}
  for name, op in _OPS.items():

    def renamed(inner, name=name):
      return inner if inner in shared else f'{name}.{inner}'.rstrip('.')

    nodes += [
      dataclasses.replace(
        node,
        name=renamed(node.name),
        inputs=tuple(map(renamed, node.inputs)),
      )
      for node in op.nodes
    ]
  sizes = Graph(tuple(nodes)).shapes(_SHAPE)
  ends = [
    Node(f'{name}.read', 'conv', (name,), None, 2, sizes[name][:2], padding=0)
    for name in _OPS
  ]
  nodes += ends
  # Another name of the ONNX models.
  nodes.append(Node('logits', 'concat', tuple(end.name for end in ends)))
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


def _quant(plan, params, outputs) -> Any:
  """Returns steps and zero points from the outputs of the float network."""
  random = np.random.RandomState(0)
  quant: dict[str, dict[str, np.ndarray]] = {}
  for name, output in plan.outputs:
    if output.step is None:
      low, high = outputs[name].min(), outputs[name].max()
      step = max(-low, high) / output.codes(0)[1]
      if output.zero_point:
        step = (high - min(low, 0)) / (2**output.bits - 1)
        zero = np.float32(np.rint(-min(low, 0) / step))
        quant.setdefault(name, {})['zero_point'] = zero
      # Some values are clipped, and no two steps are equal.
      step *= random.uniform(0.8, 1)
      quant.setdefault(name, {})['output'] = np.log(np.float32(step))
  for name, bits in plan.weights if plan.learned else ():
    kernel = params[name]['kernel']
    largest = np.abs(kernel).max(tuple(range(kernel.ndim - 1)))
    step = largest / numerics.weight_range(bits)[1]
    quant.setdefault(name, {})['weights'] = np.log(step)
  return quant


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


def _run(model, graph, images):
  """Returns the outputs of all layers, [N, H, W, C], and the logits."""
  names = [node.name for node in graph.nodes[:-1]]
  tensors = [f'{n}/output' if n in ('images', 'logits') else n for n in names]
  model = copy.deepcopy(model)
  ours = any(node.op_type == 'QuantizeLinear' for node in model.graph.node)
  kind = onnx.TensorProto.UINT8 if ours else onnx.TensorProto.FLOAT
  for tensor in tensors:
    model.graph.output.append(
      onnx.helper.make_tensor_value_info(tensor, kind, None)
    )
  found = _session(model).run(['logits', *tensors], {'images': images})
  outputs = dict(zip(names, found[1:], strict=True))
  outputs = {name: a.transpose(0, 2, 3, 1) for name, a in outputs.items()}
  return outputs | {graph.nodes[-1].name: found[0]}


def _images(seed, count):
  random = np.random.RandomState(seed)
  return random.randint(0, 256, (count, *_SHAPE)).astype(np.uint8)


class _Case(NamedTuple):
  """One student in its forms, on the same images.

  Attributes:
    ours: codes of each layer from JAX, [N, H, W, C], and the logits.
    theirs: the same from ONNX Runtime.
    fake: logits of the fake-quantized student.
    operators: pairs (layer, operator) of ONNX Runtime's optimized model.
    network: the integer network.
  """

  ours: dict[str, np.ndarray]
  theirs: dict[str, np.ndarray]
  fake: np.ndarray
  operators: set[tuple[str, str]]
  network: integer.IntegerNetwork


@pytest.fixture(scope='module')
def source():
  """Returns the graph, its variables and outputs of the float network."""
  graph = _graph()
  variables = _variables(graph)
  model = onnx_graph.float_model(graph, variables, _PREPROCESSING, {})
  return graph, variables, _run(model, graph, _images(0, 16))


@pytest.fixture(scope='module')
def case(source, tmp_path_factory):
  """Returns a function from (bits, learned) to a case."""
  graph, variables, outputs = source

  @functools.cache
  def make(bits: int, learned: bool) -> _Case:
    chosen = plan_lib.Bits(bits, bits, bits, bits, 'integer')
    plan = plan_lib.make_plan(graph, chosen, learned, _PREPROCESSING.limit)
    quant = _quant(plan, variables['params'], outputs)
    student = {**variables, 'quant': quant}
    student['params'] = quantizers.settle(plan, student)
    folded = fold.fold(graph, plan, student, _PREPROCESSING)
    student['params'] = fold.round_biases(folded, student)
    images = _images(1, 64)
    ours = jax.device_get(jax.jit(folded.outputs)(images))
    apply = network_lib.builder(graph)(fake_quant.layer_set(plan)).apply
    with _quickly():
      x = _PREPROCESSING.normalize(images)
      fake = np.asarray(jax.jit(apply)(student, x))
    model = onnx_graph.integer_model(folded, {})
    file = tmp_path_factory.mktemp('ops') / 'optimized.onnx'
    _session(model, file)
    operators = {
      (re.split('/|_token_', node.name)[0], node.op_type)
      for node in onnx.load(file).graph.node
    }
    theirs = _run(model, graph, images)
    return _Case(ours, theirs, fake, operators, folded)

  return make


@contextlib.contextmanager
def _quickly():
  """Compiles without optimizations."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


_BITS = pytest.mark.parametrize(
  ('bits', 'learned'),
  [(4, True), pytest.param(8, False, marks=pytest.mark.full)],
)


@_BITS
@pytest.mark.parametrize('name', _OPS)
def test_codes_equal_those_of_the_runtime(case, name, bits, learned):
  found = case(bits, learned)
  ours, theirs = found.ours[name], found.theirs[name]
  if _OPS[name].exact:
    np.testing.assert_array_equal(ours, theirs)
  else:
    assert np.abs(np.int32(ours) - theirs).max() <= 1
    assert np.mean(ours == theirs) > 0.999
  assert len(np.unique(ours)) > 5


@_BITS
@pytest.mark.parametrize('name', _OPS)
def test_the_kernel_of_the_runtime(case, name, bits, learned):
  assert (name, _OPS[name].kernel) in case(bits, learned).operators


@_BITS
def test_only_the_expected_operators_run_in_float(case, bits, learned):
  operators = case(bits, learned).operators
  assert not {op for _, op in operators} & {'Conv', 'FusedConv', 'Gemm', 'Relu'}
  expected = {name for name, op in _OPS.items() if not op.exact} | {'images'}
  expected |= {'relu', 'relu6', 'relu_of_relu'}
  found = {name for name, op in operators if op == 'QuantizeLinear'}
  assert {name for name in found if '.' not in name} <= expected


@_BITS
def test_the_student_agrees(case, bits, learned):
  found = case(bits, learned)
  logits = found.ours['classifier']
  assert np.mean(found.fake.argmax(-1) == logits.argmax(-1)) > 0.95
  error = np.abs(found.fake - logits).max() / found.fake.std()
  assert error < (0.2 if bits == 4 else 0.05)
  assert np.ptp(logits, 0).min() > 0.5  # the logits depend on the images


def test_the_program_takes_any_number_of_images(case):
  network = case(4, True).network
  (batch,) = jax.export.symbolic_shape('N')
  images = jax.ShapeDtypeStruct((batch, *_SHAPE), np.uint8)
  exported = jax.export.export(jax.jit(network.logits))(images)
  assert str(exported.out_avals[0].shape) == '(N, 5)'


def test_float_twin(source):
  graph, variables, outputs = source
  network = network_lib.builder(graph)(float_layers.layer_set())
  with _quickly():
    x = _PREPROCESSING.normalize(_images(0, 16))
    logits = jax.jit(network.apply)(variables, x)
  np.testing.assert_allclose(outputs['classifier'], logits, atol=1e-4)
