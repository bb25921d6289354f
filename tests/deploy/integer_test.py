"""Tests the integer network against int64 sums, student and ONNX Runtime."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from clusterq_jax import data
from clusterq_jax.deploy import fold, integer, student
from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.models import protocol, registry
from clusterq_jax.models.graph import trace
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.quant import quantizers
from clusterq_jax.weights import teacher

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
onnx_layers = pytest.importorskip('clusterq_jax.deploy.onnx_graph')
pytestmark = pytest.mark.usefixtures('optimized')


def _bits(weights, activations):
  return plan_lib.Bits(weights, activations, weights, weights, 'integer')


def _student(source, bits, learned=True):
  """Returns a student with the teacher's weights and steps from images."""
  plan = plan_lib.make_plan(
    source.graph, bits, learned, source.preprocessing.limit
  )
  random = np.random.RandomState(0)
  shape = source.preprocessing.shape
  noise = random.randint(0, 256, (16, *shape), np.uint8)
  flat = np.broadcast_to(random.randint(0, 256, (16, 1, 1, 1)), noise.shape)
  x = source.preprocessing.normalize(np.uint8(noise // 2 + flat // 2))
  network = source.build(fake_quant.layer_set(plan))

  @jax.jit
  def steps(variables, x):
    return network.apply(variables, x, mutable=['quant'])[1]['quant']

  return student.Student(
    variables={**source.variables, 'quant': steps(source.variables, x)},
    preprocessing=source.preprocessing,
    bits=bits,
    class_names=(),
    graph=source.graph,
    plan=plan,
    _network=network,
  )


@pytest.fixture(scope='module')
def embedded():
  return teacher.load('resnet20', teacher.EMBEDDED)


@pytest.fixture(scope='module')
def quantized(embedded):
  """Returns a student of the embedded teacher for (weight, activation) bits."""
  return functools.cache(lambda *bits: _student(embedded, _bits(*bits)))


@pytest.fixture(scope='module')
def test_images():
  return data.read_fashion_mnist(data.ASSETS, 't10k')


@pytest.fixture(scope='module')
def integer_logits(quantized, test_images):
  """Returns logits of the first 1,000 images for (weight, activation) bits."""

  def logits(*bits):
    folded = quantized(*bits).integer()
    return np.asarray(jax.jit(folded.logits)(test_images.images[:1000]))

  return functools.cache(logits)


class _Mobile(nn.Module):
  """Network of operations that ResNets for small images lack."""

  layers: protocol.LayerSet

  @nn.compact
  def __call__(self, x):
    x = self.layers.input(name='input')(x)
    x = self.layers.conv_bn(8, 3, act='relu6', name='stem')(x)
    x = self.layers.max_pool(kernel=3, strides=2, padding=1, name='max')(x)
    y = self.layers.conv_bn(8, 3, groups=8, act='relu6', name='depthwise')(x)
    y = self.layers.conv_bn(8, 1, name='project')(y)
    x = self.layers.add(name='add')(x, y)  # signed
    x = self.layers.max_pool(kernel=2, strides=1, padding=0, name='max2')(x)
    x = self.layers.conv_bn(16, 3, padding=0, act='relu6', name='head')(x)
    x = self.layers.global_avg_pool(name='pool')(x)
    return self.layers.dense(5, name='classifier')(x)


class _Windows(nn.Module):
  """Network with signed and unsigned average pools and a signed residual."""

  layers: protocol.LayerSet

  @nn.compact
  def __call__(self, x):
    x = self.layers.input(name='input')(x)
    x = self.layers.conv_bn(8, 3, name='stem')(x)
    y = self.layers.conv_bn(8, 3, name='conv1')(x)
    x = self.layers.add(name='add')(x, y)
    x = self.layers.avg_pool(kernel=3, strides=2, name='windows')(x)
    x = self.layers.conv_bn(16, 3, act='relu', name='conv2')(x)
    x = self.layers.avg_pool(kernel=2, strides=2, name='pool')(x)
    return self.layers.dense(5, name='classifier')(x)


_OTHERS = {'mobile': _Mobile, 'windows': _Windows}


def _tiny(kind='conv', order='rgb', channels=3):
  """Returns a small student with BatchNorm gains of both signs and near zero.

  Args:
    kind: kind of a ResNet's shortcut, or one of the networks above.
    order: channel order of the input.
    channels: number of input channels.
  """
  build: registry.Builder
  if kind in _OTHERS:
    build = _OTHERS[kind]
  else:
    build = registry.builder('resnet8', num_classes=5, shortcut=kind)
  shape = (9, 12, channels)
  shapes = jax.eval_shape(
    build(float_layers.layer_set()).init,
    jax.random.key(0),
    jnp.zeros((1, *shape)),
  )
  random = np.random.RandomState(0)

  def value(path, leaf):
    shape = leaf.shape
    if path[-1].key == 'kernel':
      array = random.randn(*shape) * np.sqrt(2 / np.prod(shape[:-1]))
    elif path[-1].key == 'var':
      array = random.uniform(0.5, 1.5, shape)
    elif path[-1].key == 'scale':
      array = random.uniform(0.5, 1.5, shape) * random.choice([-1, 1], shape)
      array[3] = 1e-12
    else:
      array = 0.3 * random.randn(*shape)
    return array.astype(np.float32)

  grey = channels == 1
  return teacher.Teacher(
    build=build,
    graph=trace(build),
    variables=jax.tree_util.tree_map_with_path(value, shapes),
    preprocessing=Preprocessing(
      image_size=shape[:2],
      mean=(0.4,) if grey else (0.4, 0.45, 0.5),
      std=(0.3,) if grey else (0.2, 0.25, 0.3),
      channel_order=order,
    ),
    num_classes=5,
    crop=1.0,
    class_names=(),
    notes=(),
  )


_FLOAT = {
  'Conv',
  'FusedConv',
  'Gemm',
  'MatMul',
  'Relu',
  'AveragePool',
  'QLinearAveragePool',  # float inside
}


def _session(model, optimized=None):
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  # This option is exact on CPUs without VNNI as well, where the default kernels
  # for 8-bit weights saturate.
  options.add_session_config_entry('session.x64quantprecision', '1')
  if optimized is not None:
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
  return onnxruntime.InferenceSession(
    model.SerializeToString(), options, providers=['CPUExecutionProvider']
  )


def _run(model, images):
  return _session(model).run(['logits'], {'images': images})[0]


# --- Bit for bit what ONNX Runtime computes ----------------------------------


@pytest.mark.parametrize(
  'bits',
  [
    pytest.param((8, 8), marks=pytest.mark.slow),
    pytest.param((4, 8), marks=pytest.mark.slow),
    (4, 4),
  ],
)
def test_runtime_agrees_on_the_embedded_network(
  quantized, integer_logits, test_images, bits
):
  images = test_images.images[:1000]
  model = onnx_layers.integer_model(quantized(*bits).integer(), {})
  ours = integer_logits(*bits)
  np.testing.assert_array_equal(ours, _run(model, images))
  right = np.mean(np.argmax(ours, -1) == test_images.labels[:1000])
  assert right > (0.8 if bits == (4, 4) else 0.9)


@pytest.mark.parametrize('kind', ['pad', 'conv', *_OTHERS])
@pytest.mark.parametrize(
  ('weights', 'activations', 'learned', 'order', 'channels'),
  [
    pytest.param(2, 2, True, 'rgb', 3, marks=pytest.mark.slow),
    (3, 5, False, 'bgr', 3),
    pytest.param(5, 3, True, 'grey', 1, marks=pytest.mark.slow),
    pytest.param(8, 7, True, 'rgb', 3, marks=pytest.mark.slow),
  ],
)
def test_runtime_agrees_at_any_bits(
  kind, weights, activations, learned, order, channels
):
  source = _tiny(kind, order, channels)
  folded = _student(source, _bits(weights, activations), learned).integer()
  random = np.random.RandomState(1)
  images = random.randint(0, 256, (33, 9, 12, channels), np.uint8)
  model = onnx_layers.integer_model(folded, {})
  ours = jax.jit(folded.logits)(images)
  np.testing.assert_array_equal(ours, _run(model, images))
  assert np.ptp(ours, 0).min() > 0  # the logits depend on the images
  # The model accepts any batch size.
  np.testing.assert_array_equal(ours[:1], _run(model, images[:1]))


def test_zero_points_move_the_codes():
  one = _student(_tiny('windows'), _bits(4, 4))
  folded = one.integer()
  zeros = []
  for name in ('stem', 'windows'):  # signed, and they feed a convolution
    zeros.append(float(one.variables['quant'][name]['zero_point']))
    low = 128 - zeros[-1]
    assert folded.layers[name].grid[1:] == (128, low, low + 15)
  assert zeros != [8, 8]  # as the tests of the runtime above have them
  # A byte cannot hold larger codes.
  assert folded.layers['add'].grid[1:] == (128, 0, 255)


@pytest.mark.parametrize(
  ('kind', 'adds', 'windows', 'pools'),
  [('embedded', 9, 0, 1), ('mobile', 1, 0, 1), ('windows', 1, 2, 0)],
)
def test_every_convolution_runs_in_integers(
  quantized, tmp_path, kind, adds, windows, pools
):
  network = (
    quantized(4, 4)
    if kind == 'embedded'
    else _student(_tiny(kind), _bits(4, 4))
  )
  optimized = tmp_path / 'optimized.onnx'
  _session(onnx_layers.integer_model(network.integer(), {}), optimized)
  found = collections.Counter(
    node.op_type for node in onnx.load(optimized).graph.node
  )
  # An average pool is a convolution with ones.
  assert found['QLinearConv'] == len(network.graph.batch_norms) + windows
  assert found['QGemm'] == 1
  assert found['QLinearAdd'] == adds
  assert found['QLinearGlobalAveragePool'] == pools
  # Only the normalisation of pixels, up to one quantizer, runs in float.
  assert not found.keys() & _FLOAT
  assert found['QuantizeLinear'] == 1
  assert not found['DequantizeLinear']


def test_the_file(quantized):
  folded = quantized(4, 4).integer()
  model = onnx_layers.integer_model(folded, {'bits': 'W4A4'})
  assert {p.key: p.value for p in model.metadata_props} == {'bits': 'W4A4'}
  assert model.opset_import[0].version == 21
  (images,), (logits,) = model.graph.input, model.graph.output
  shape = [
    d.dim_value or d.dim_param for d in images.type.tensor_type.shape.dim
  ]
  assert shape == ['N', 28, 28, 1]
  assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
  shape = [
    d.dim_value or d.dim_param for d in logits.type.tensor_type.shape.dim
  ]
  assert shape == ['N', 10]
  stored = {t.data_type for t in model.graph.initializer if t.dims[1:]}
  assert stored <= {onnx.TensorProto.INT4, onnx.TensorProto.FLOAT}


# --- Against the networks it came from ---------------------------------------


def test_float_twin_is_the_teacher(embedded, test_images):
  images = test_images.images[:64]
  model = onnx_layers.float_model(
    embedded.graph, embedded.variables, embedded.preprocessing, {}
  )
  network = embedded.build(float_layers.layer_set())
  x = embedded.preprocessing.normalize(images)
  logits = network.apply(embedded.variables, x)
  np.testing.assert_allclose(_run(model, images), logits, atol=2e-4)


@pytest.mark.parametrize('order', ['rgb', 'bgr'])
@pytest.mark.parametrize('kind', ['conv', *_OTHERS])
def test_float_twin_with_other_layers(kind, order):
  source = _tiny(kind, order)
  images = np.random.RandomState(1).randint(0, 256, (5, 9, 12, 3), np.uint8)
  model = onnx_layers.float_model(
    source.graph, source.variables, source.preprocessing, {}
  )
  network = source.build(float_layers.layer_set())
  x = source.preprocessing.normalize(images)
  logits = network.apply(source.variables, x)
  np.testing.assert_allclose(_run(model, images), logits, atol=1e-4)


@pytest.mark.parametrize(
  ('bits', 'least'),
  [pytest.param((8, 8), 0.995, marks=pytest.mark.slow), ((4, 4), 0.97)],
)
def test_agrees_with_the_student(
  quantized, integer_logits, test_images, bits, least
):
  """Student and integer network differ only by rounding of biases and sums."""
  fake = jax.jit(quantized(*bits).logits)(test_images.images[:1000])
  real = integer_logits(*bits)
  assert np.mean(np.argmax(fake, -1) == real.argmax(-1)) >= least


@pytest.mark.slow
@pytest.mark.parametrize('learned', [True, False])
def test_settled_weights(embedded, test_images, learned):
  """The student's logits equal the integer network's up to float rounding."""
  network = _student(embedded, _bits(4, 4), learned)
  settled = dict(network.variables)
  settled['params'] = quantizers.settle(network.plan, settled)
  for name, layer in network.variables['params'].items():
    before, after = layer['kernel'], settled['params'][name]['kernel']
    values = {len(np.unique(after[..., o])) for o in range(after.shape[-1])}
    assert max(values) <= 15  # codes from -7 to 7
    largest = np.abs(before).max(tuple(range(before.ndim - 1)))
    assert np.all(np.abs(after - before) <= largest)
  folded = dataclasses.replace(network, variables=settled).integer()
  settled = {**settled, 'params': fold.round_biases(folded, settled)}
  network = dataclasses.replace(network, variables=settled)
  again = network.integer()
  for name, layer in folded.layers.items():
    other = again.layers[name]
    np.testing.assert_array_equal(other.table, layer.table)
    if layer.weights is not None:
      np.testing.assert_array_equal(other.weights.codes, layer.weights.codes)
      np.testing.assert_array_equal(other.weights.bias, layer.weights.bias)
  # The bias of a convolution with BatchNorm folded in is an integer multiple of
  # the unit of the sums.
  node = folded.graph.node('stage2_block1_conv2')
  _, _, bias = fold.fold_batch_norm(settled, node)
  unit = (
    folded.layers[node.inputs[0]].grid.step
    * folded.layers[node.name].weights.step
  )
  assert np.abs(bias / unit - np.rint(bias / unit)).max() < 0.05
  images = test_images.images[:500]
  real = np.asarray(jax.jit(folded.logits)(images)).argmax(-1)
  fake = np.asarray(jax.jit(network.logits)(images)).argmax(-1)
  assert np.mean(real == fake) >= 0.99


# --- Arithmetic --------------------------------------------------------------


@pytest.mark.slow
def test_wide_sums_are_exact():
  """Sums above 2^24 are exact, although float32 alone would round them."""
  random = np.random.RandomState(0)
  source = _tiny('conv')
  folded = _student(source, _bits(8, 8)).integer()
  name = 'stage3_block1_conv2'
  shape = (3, 3, 512, 4)
  codes = random.randint(100, 128, shape).astype(np.int8)
  x = random.randint(200, 256, (2, 5, 5, 512)).astype(np.uint8)
  bias = np.arange(4, dtype=np.int32)
  expected = np.zeros((2, 5, 5, 4), np.int64)
  padded = np.pad(np.int64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
  for i in range(3):
    for j in range(3):
      expected += padded[:, i : i + 5, j : j + 5] @ np.int64(codes[i, j])
  expected += bias
  assert expected.max() > 2**24

  def sums(parts):
    layer = folded.layers[name]
    assert layer.sources[0].zero == 0
    weights = layer.weights._replace(codes=codes, bias=bias, parts=parts)

    def convolve(x, kernel):
      return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        [(1, 1)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision='highest',
      )

    layer = dataclasses.replace(layer, weights=weights)
    return integer.weighted_sums(layer, jnp.asarray(x), convolve)

  for parts in (2, 4, 8):
    np.testing.assert_array_equal(sums(parts), expected)
  assert np.any(sums(1) != expected)


def test_relu6_ends_the_codes():
  source = _tiny('mobile')
  large = source.variables['params']['stem']
  large['scale'] = 9 * large['scale']  # so that six is exceeded
  network = _student(source, _bits(8, 8))
  folded = network.integer()
  grid = folded.layers['stem'].grid
  assert grid.step * (grid.high + 0.5) > 6 > grid.step * (grid.high - 0.5)
  assert folded.layers['max'].grid == grid  # on the grid of its input
  images = np.random.RandomState(1).randint(0, 256, (99, 9, 12, 3), np.uint8)
  fake = np.asarray(network.logits(images))
  real = np.asarray(jax.jit(folded.logits)(images))
  assert np.mean(fake.argmax(-1) == real.argmax(-1)) > 0.95
  np.testing.assert_allclose(real, fake, atol=0.05 * np.std(fake))


def _wide(network):
  layers = network.integer().layers
  return [n for n, a in layers.items() if a.weights and a.weights.parts > 1]


@pytest.mark.slow
def test_wide_layers_are_found():
  source = _tiny('conv')
  kernel = source.variables['params']['stage3_block1_conv2']['kernel']
  assert not _wide(_student(source, _bits(8, 8)))
  # Equal weights all have the largest code: 64 * 9 * 127 * 255 > 2^24.
  source.variables['params']['stage3_block1_conv2']['kernel'] = np.ones_like(
    kernel
  )
  wide = _wide(_student(source, _bits(8, 8), learned=False))
  assert wide == ['stage3_block1_conv2']


@pytest.mark.slow
def test_small_codes_are_scaled_up(quantized):
  """Larger codes make the unit of the bias finer, but must not saturate."""
  student44 = quantized(4, 4).integer()
  assert student44.layers['stage2_block1_conv1'].weights.factor == 18
  assert student44.layers['stem'].weights.factor == 9  # its input has 8 bits
  eight = [a.weights for a in quantized(8, 8).integer().layers.values()]
  assert {weights.factor for weights in eight if weights} == {1}
  for network in (student44, quantized(4, 8).integer()):
    for layer in network.layers.values():
      if layer.weights is not None:
        codes = layer.weights.codes
        assert not np.any(codes % layer.weights.factor)
        # Two products in 16 bits.
        high = layer.sources[0].high
        assert 2 * high * np.abs(np.int64(codes)).max() < 2**15


def test_a_dead_gain_keeps_its_bias():
  network = _student(_tiny(), _bits(8, 8)).integer()
  layer = network.layers['stem']
  assert not np.any(layer.weights.codes[..., 3])
  step = layer.sources[0].step * layer.weights.step[3]
  _, _, bias = fold.fold_batch_norm(_tiny().variables, layer.node)
  assert layer.weights.bias[3] * step == pytest.approx(bias[3], rel=1e-6)
