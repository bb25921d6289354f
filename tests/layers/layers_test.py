"""The bricks, and the networks that are built from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.models import cifar_resnet as resnet
from clusterq_jax.models import protocol, registry
from clusterq_jax.models.graph import Node, trace
from clusterq_jax.ops import channels, convolution
from clusterq_jax.ops.moments import Moments, Statistics, batch_statistics
from clusterq_jax.quant import plan, quantizers

# Whole networks run once here: what costs time is compiling them.
_jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


def _numpy_conv(x, kernel, strides, padding, groups=1):
  """Sums over windows, in float64."""
  x, kernel = np.float64(x), np.float64(kernel)
  side, inputs, outputs = kernel.shape[0], kernel.shape[2], kernel.shape[3]
  x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  height = (x.shape[1] - side) // strides + 1
  width = (x.shape[2] - side) // strides + 1
  out = np.zeros((len(x), height, width, outputs))
  for o in range(outputs):
    group = o // (outputs // groups)
    own = slice(group * inputs, (group + 1) * inputs)
    for i, j in np.ndindex(height, width):
      window = x[:, i * strides :, j * strides :, own][:, :side, :side]
      out[:, i, j, o] = np.sum(window * kernel[..., o], (1, 2, 3))
  return out


# --- Convolution -------------------------------------------------------------


@pytest.mark.parametrize(
  ('size', 'side', 'strides', 'padding', 'groups'),
  [
    ((7, 5), 3, 1, 1, 1),
    ((2, 9), 3, 1, 1, 1),
    ((1, 1), 3, 1, 1, 1),
    ((7, 5), 5, 1, 2, 1),
    ((9, 8), 3, 1, 1, 1),
    ((9, 8), 5, 1, 2, 1),
    ((7, 5), 3, 1, 0, 1),
    ((7, 5), 2, 1, 1, 1),
    ((9, 8), 2, 1, 1, 1),
    ((7, 5), 1, 1, 0, 1),
    ((7, 5), 3, 2, 1, 1),
    ((6, 5), 5, 2, 2, 1),
    ((7, 6), 1, 2, 0, 1),
    ((7, 5), 3, 1, 1, 2),
    ((7, 5), 3, 2, 1, 4),
    # Depthwise, of 8 channels.
    ((7, 5), 3, 1, 1, 8),
    ((8, 7), 3, 2, 1, 8),
    ((9, 6), 5, 2, 0, 8),
    # TensorFlow's padding: one more at the end, or none.
    ((6, 7), 3, 2, 'same', 1),
    ((7, 5), 3, 1, 'same', 1),
    ((8, 7), 5, 2, 'same', 8),
    ((5, 6), 1, 2, 'same', 1),
  ],
)
def test_convolution(size, side, strides, padding, groups):
  random = np.random.RandomState(0)
  channels = max(4, groups)
  x = random.randn(3, *size, channels).astype(np.float32)
  kernel = random.randn(side, side, channels // groups, 8).astype(np.float32)
  pads = 'SAME' if padding == 'same' else [(padding, padding)] * 2

  def xla(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel,
      (strides, strides),
      pads,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  def ours(x, kernel):
    return convolution.conv2d(x, kernel, strides, padding, groups)

  @jax.jit
  def both(x, kernel, g):
    def run(function):
      value, pullback = jax.vjp(function, x, kernel)
      return value, *pullback(g)

    return run(ours), run(xla)

  if padding == 'same':
    expected = xla(x, kernel)
  else:
    expected = _numpy_conv(x, kernel, strides, padding, groups)
  g = random.randn(*expected.shape).astype(np.float32)
  found, reference = both(x, kernel, g)
  np.testing.assert_allclose(found[0], expected, atol=1e-4)
  np.testing.assert_allclose(found[1], reference[1], atol=1e-4)
  np.testing.assert_allclose(found[2], reference[2], atol=2e-4)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='for CPUs')
def test_compiler_options(monkeypatch, tmp_path):
  info = tmp_path / 'cpuinfo'
  monkeypatch.setattr(convolution, '_CPU_INFO', info)
  monkeypatch.setattr('platform.machine', lambda: 'x86_64')
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
  info.write_text('flags: avx2')
  options = convolution.compiler_options()
  info.write_text('flags: avx2 avx512f')
  wide = convolution.compiler_options()
  assert options.items() < wide.items()
  # An option that XLA does not know is an error.
  y = jax.jit(convolution.conv2d, compiler_options=wide)(x, kernel)
  assert y[0, 4, 4, 0] == 36

  monkeypatch.setattr('platform.machine', lambda: 'aarch64')
  assert not convolution.compiler_options()


@pytest.mark.parametrize(('groups', 'strides'), [(1, 1), (1, 2), (8, 1)])
def test_convolution_in_bfloat16(groups, strides):
  random = np.random.RandomState(0)
  x = random.randn(3, 7, 6, 8).astype(np.float32)
  kernel = random.randn(3, 3, 8 // groups, 8).astype(np.float32)
  shape = jax.eval_shape(
    lambda x, k: convolution.conv2d(x, k, strides, 1, groups), x, kernel
  ).shape
  g = random.randn(*shape).astype(np.float32)

  def run(dtype, *arrays):
    def function(x, kernel):
      return convolution.conv2d(x, kernel, strides, 1, groups, dtype)

    value, pullback = jax.vjp(function, *arrays[:2])
    return value, *pullback(arrays[2])

  def rounded(a):
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)

  found = jax.jit(functools.partial(run, jnp.bfloat16))(x, kernel, g)
  # Of the same rounded numbers, in float32.
  expected = jax.jit(functools.partial(run, None))(
    *map(rounded, (x, kernel, g))
  )
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=2**-6, atol=0.03 * np.std(b))


# --- One ConvBN --------------------------------------------------------------


def _conv_variables(side, inputs, outputs):
  random = np.random.RandomState(1)
  shapes = {'scale': outputs, 'bias': outputs}
  params = {k: random.randn(n).astype(np.float32) for k, n in shapes.items()}
  kernel = random.randn(side, side, inputs, outputs).astype(np.float32)
  stats = {
    'mean': random.randn(outputs).astype(np.float32),
    'var': (0.1 + random.rand(outputs)).astype(np.float32),
  }
  return {'params': {'kernel': kernel, **params}, 'batch_stats': stats}


def _numpy_batch_norm(h, variables):
  params, stats = variables['params'], variables['batch_stats']
  x = (h - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  return x * params['scale'] + params['bias']


@pytest.fixture
def image():
  return np.random.RandomState(2).randn(3, 5, 7, 4).astype(np.float32)


@pytest.mark.parametrize(
  ('side', 'strides', 'padding', 'act'),
  [
    (3, 1, None, None),
    (3, 2, None, 'relu'),
    (1, 2, None, None),
    (3, 1, 0, None),
  ],
)
def test_float_conv_bn(image, side, strides, padding, act):
  layer = float_layers.ConvBN(6, side, strides, padding, act=act, tap=True)
  variables = _conv_variables(side, 4, 6)
  y, state = layer.apply(variables, image, mutable=['moments'])
  pad = side // 2 if padding is None else padding
  h = _numpy_conv(image, variables['params']['kernel'], strides, pad)
  expected = _numpy_batch_norm(h, variables)
  expected = np.maximum(expected, 0) if act else expected
  np.testing.assert_allclose(y, expected, atol=1e-4)
  # What is recorded is the input of BatchNorm.
  moments = state['moments']['input']
  assert isinstance(moments, Moments)
  np.testing.assert_allclose(moments.mean, h.mean((1, 2)), atol=1e-4)
  np.testing.assert_allclose(moments.var, h.var((1, 2)), rtol=1e-3, atol=1e-4)


def test_pretraining_moves_the_statistics(image):
  layer = float_layers.ConvBN(6, 3, train=True)
  variables = _conv_variables(3, 4, 6)
  y, state = layer.apply(variables, image, mutable=['batch_stats'])
  h = _numpy_conv(image, variables['params']['kernel'], 1, 1)
  batch = {'mean': h.mean((0, 1, 2)), 'var': h.var((0, 1, 2))}
  expected = _numpy_batch_norm(h, {**variables, 'batch_stats': batch})
  np.testing.assert_allclose(y, expected, atol=1e-3)
  for key, new in batch.items():
    moved = 0.9 * variables['batch_stats'][key] + 0.1 * new
    np.testing.assert_allclose(state['batch_stats'][key], moved, rtol=1e-3)


def _quant_conv(**modes):
  decided = plan.Plan(
    weights=(('conv', 3),),
    outputs=(('conv', plan.Output(4, False)),),
    learned=False,
  )
  return fake_quant.QuantConv(
    plan=decided, features=6, kernel=1, act='relu', name='conv', **modes
  )


def test_quantized_conv_by_hand(image):
  variables = _conv_variables(1, 4, 6)
  step = 0.25

  def apply(params):
    quant = {'output': jnp.log(step)}
    return _quant_conv().apply(
      {**variables, 'params': params, 'quant': quant}, image
    )

  @_jit
  def value_and_gradient(params):
    y, pullback = jax.vjp(apply, params)
    return y, pullback(jnp.ones_like(y))[0]

  y, gradient = value_and_gradient(variables['params'])
  kernel = np.float64(variables['params']['kernel'])
  scale = np.abs(kernel).max((0, 1, 2)) / 3
  kernel = np.round(kernel / scale) * scale
  h = _numpy_batch_norm(_numpy_conv(image, kernel, 1, 0), variables)
  codes = np.clip(np.round(h / step), 0, 15)
  # A value on the edge between two codes may fall to either.
  edge = np.abs(h / step % 1 - 0.5) < 1e-3
  assert edge.mean() < 0.02
  np.testing.assert_allclose(
    np.where(edge, 0, y), np.where(edge, 0, step * codes), atol=1e-5
  )
  assert codes.max() == 15  # the clip is in play
  # Straight through two quantizers: where the output is within its range.
  inside = (h > 0) & (h / step <= 15)
  np.testing.assert_allclose(gradient['bias'], inside.sum((0, 1, 2)), atol=1)
  gain = variables['params']['scale'] / np.sqrt(
    variables['batch_stats']['var'] + 1e-5
  )
  expected = np.einsum('bhwi,bhwo->io', image, inside * gain)
  np.testing.assert_allclose(gradient['kernel'][0, 0], expected, rtol=1e-3)


def test_calibration_replaces_the_step(image):
  variables = _conv_variables(1, 4, 6)
  before = {**variables, 'quant': {'output': jnp.log(0.25)}}
  y, state = _quant_conv().apply(before, image, mutable=['quant'])
  assert state['quant']['output'] == before['quant']['output']
  z, state = _quant_conv(calibrate=True).apply(before, image, mutable=['quant'])
  step = np.exp(state['quant']['output'])
  assert z.max() > y.max() == 15 * 0.25
  np.testing.assert_allclose(15 * step, z.max(), rtol=1e-5)


def test_calibration_corrects_batch_norm(image):
  variables = _conv_variables(1, 4, 6)
  wanted = Statistics(
    variables['batch_stats']['mean'], jnp.sqrt(variables['batch_stats']['var'])
  )
  targets = {'targets': {'input': wanted}}
  corrected, state = _quant_conv(calibrate=True).apply(
    {**variables, **targets}, image, mutable=['params', 'quant']
  )
  # Where the network runs, nothing has to be given but what was written.
  y = _quant_conv().apply({**variables, **state}, image)
  np.testing.assert_array_equal(y, corrected)
  params = state['params']
  np.testing.assert_array_equal(params['kernel'], variables['params']['kernel'])
  kernel = np.float64(params['kernel'])
  step = np.abs(kernel).max((0, 1, 2)) / 3
  h = _numpy_conv(image, np.round(kernel / step) * step, 1, 0)
  before = variables['params']
  ratio = np.clip(wanted.std / h.std((0, 1, 2)), 0.5, 2)
  np.testing.assert_allclose(
    params['scale'], before['scale'] * ratio, rtol=1e-3
  )
  # Its mean is now the wanted one, which gives the BatchNorm's bias.
  out = _numpy_batch_norm(h, {**variables, 'params': params})
  np.testing.assert_allclose(out.mean((0, 1, 2)), before['bias'], atol=1e-3)


@pytest.mark.parametrize(('channels', 'features'), [(2, 4), (3, 6), (1, 4)])
def test_pad_shortcut(channels, features):
  x = np.random.RandomState(0).randn(2, 5, 4, channels).astype(np.float32)
  y = np.asarray(float_layers.pad_channels(x, features, 2))
  assert y.shape == (2, 3, 2, features)
  before = (features - channels) // 2
  np.testing.assert_array_equal(
    y[..., before : before + channels], x[:, ::2, ::2]
  )
  assert np.count_nonzero(y) == x[:, ::2, ::2].size


@pytest.mark.parametrize(('kernel', 'strides'), [(2, 2), (3, 2), (4, 1)])
def test_avg_pool(image, kernel, strides):
  y = float_layers.avg_pool(image, kernel, strides)
  windows = np.lib.stride_tricks.sliding_window_view(
    np.float64(image), (kernel, kernel), (1, 2)
  )
  expected = windows[:, ::strides, ::strides].mean((-1, -2))
  np.testing.assert_allclose(y, expected, atol=1e-6)


def test_avg_pool_has_a_quantizer(image):
  decided = plan.Plan((), (('pool', plan.Output(8, True)),), learned=True)
  layers = fake_quant.layer_set(decided)
  pool = layers.avg_pool(kernel=2, strides=2, name='pool')
  y = pool.apply({'quant': {'output': jnp.log(0.25)}}, image)
  codes = np.asarray(float_layers.avg_pool(image, 2, 2)) / 0.25
  np.testing.assert_allclose(y, 0.25 * np.round(codes), atol=1e-6)
  assert np.ptp(np.round(codes)) > 4


@pytest.mark.parametrize('quantized', [False, True])
def test_dense_flattens_as_torch(image, quantized):
  kernel = np.random.RandomState(0).randn(5 * 7 * 4, 3).astype(np.float32)
  layers = float_layers.layer_set()
  if quantized:
    layers = fake_quant.layer_set(plan.Plan((('last', 8),), (), False))
  params = {'kernel': kernel, 'bias': np.zeros(3, np.float32)}
  y = layers.dense(3, name='last').apply({'params': params}, image)
  expected = image.transpose(0, 3, 1, 2).reshape(3, -1) @ kernel
  np.testing.assert_allclose(y, expected, atol=0.5 if quantized else 1e-4)


# --- Wiring ------------------------------------------------------------------


def _forward_order(blocks, shortcut):
  """BatchNorm layers as He et al. 2015 lay them out, written out again."""
  names = ['stem']
  for stage in (1, 2, 3):
    for block in range(1, blocks + 1):
      name = f'stage{stage}_block{block}'
      names += [f'{name}_conv1', f'{name}_conv2']
      if shortcut == 'conv' and stage > 1 and block == 1:
        names.append(f'{name}_shortcut')
  return names


@pytest.mark.parametrize(
  ('arch', 'blocks', 'shortcut'),
  [
    ('resnet20', 3, 'conv'),
    ('resnet110', 18, 'pad'),
    ('resnet110', 18, 'conv'),
  ],
)
def test_moments_come_in_forward_order(arch, blocks, shortcut):
  build = registry.builder(arch, num_classes=10, shortcut=shortcut)
  graph = trace(build)
  names = _forward_order(blocks, shortcut)
  assert list(graph.batch_norms) == names
  assert list(graph.weighted) == [*names, 'classifier']
  moments = {n: {'input': jnp.full(1, i)} for i, n in enumerate(names)}
  moments = jax.tree.map(lambda a: a, moments)  # as Flax, which sorts keys
  assert blocks < 10 or list(moments) != names
  found = float_layers.ordered_moments({'moments': moments}, graph)
  np.testing.assert_array_equal(jnp.concatenate(found), np.arange(len(names)))


def test_graph_order_is_the_order_of_execution():
  build = registry.builder('resnet32', num_classes=10, shortcut='conv')
  called = []

  def interceptor(call, args, kwargs, context):
    if context.method_name == '__call__':
      called.append(context.module.name)
    return call(*args, **kwargs)

  network = build(float_layers.layer_set(tap=True))
  with nn.intercept_methods(interceptor):
    variables = jax.eval_shape(
      network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )
  graph = trace(build)
  layers = [name for name in called if name in variables['params']]
  assert layers == list(graph.weighted)
  assert set(graph.batch_norms) == set(variables['moments'])


def test_wiring_of_a_block():
  graph = trace(registry.builder('resnet20', num_classes=10))
  nodes = {node.name: node for node in graph.nodes}
  assert nodes['stage2_block1_add'] == Node(
    'stage2_block1_add',
    'add',
    ('stage2_block1_shortcut', 'stage2_block1_conv2'),
    'relu',
  )
  assert nodes['stage2_block1_shortcut'].op == 'pad_shortcut'
  consumers = {node.name for node in graph.consumers('stage1_block1_add')}
  assert consumers == {'stage1_block2_conv1', 'stage1_block2_add'}


def test_two_layers_of_one_name():
  class Twice(nn.Module):
    layers: protocol.LayerSet

    @nn.compact
    def __call__(self, x):
      x = self.layers.conv_bn(4, 3, name='conv')(x)
      return self.layers.conv_bn(4, 3, name='conv')(x)

  with pytest.raises(ValueError, match="two layers are called 'conv'"):
    trace(Twice)


# --- Teacher and student -----------------------------------------------------


class _Pair:
  """A ResNet-8, its variables, and its students."""

  def __init__(self, channels, shortcut):
    self.build = functools.partial(
      resnet.CifarResNet, depth=8, num_classes=5, shortcut=shortcut
    )
    self.graph = trace(self.build)
    random = np.random.RandomState(0)
    self.x = random.randn(4, 8, 8, channels).astype(np.float32)

    def fill(path, leaf):
      """Like a trained network: kernels of unit gain, positive variances."""
      kind = path[-1].key
      if kind in ('scale', 'var'):
        value = 0.5 + random.rand(*leaf.shape)
      elif kind == 'kernel':
        value = random.randn(*leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
      else:
        value = 0.2 * random.randn(*leaf.shape)
      return value.astype(np.float32)

    self.variables = jax.tree_util.tree_map_with_path(
      fill, self.shapes(float_layers.layer_set())
    )
    self.teacher = self.build(float_layers.layer_set())
    self.logits = np.asarray(_jit(self.teacher.apply)(self.variables, self.x))

  def shapes(self, layers):
    return jax.eval_shape(self.build(layers).init, jax.random.key(0), self.x)

  def plan(self, bits=8, placement='paper', learned=True):
    chosen = plan.Bits(bits, bits, bits, bits, placement)
    limit = float(np.abs(self.x).max())
    return plan.make_plan(self.graph, chosen, learned, limit)

  @functools.cache  # noqa: B019
  def calibrated(self, decided):
    """Logits and `quant` of a student that calibrates on x."""
    student = self.build(fake_quant.layer_set(decided, calibrate=True))
    apply = _jit(functools.partial(student.apply, mutable=['quant']))
    logits, state = apply(self.variables, self.x)
    return np.asarray(logits), state['quant']


@functools.cache
def _pair(channels=3, shortcut='pad'):
  return _Pair(channels, shortcut)


def _distance(a, b):
  return np.sqrt(np.mean(np.square(a - b)) / np.var(b))


@pytest.mark.parametrize(('channels', 'shortcut'), [(3, 'pad'), (1, 'conv')])
def test_teacher_and_student_share_their_variables(channels, shortcut):
  pair = _pair(channels, shortcut)
  assert pair.logits.shape == (4, 5)
  student = pair.shapes(fake_quant.layer_set(pair.plan()))
  teacher = pair.shapes(float_layers.layer_set())
  assert set(teacher) == {'params', 'batch_stats'}
  for collection in teacher:
    assert student[collection] == teacher[collection]
  assert student['params']['stem']['kernel'].shape == (3, 3, channels, 16)
  assert ('stage2_block1_shortcut' in student['params']) == (shortcut == 'conv')


def _expected_quant(pair, placement, learned):
  """Layer name -> the shapes of its steps, written out by hand."""
  widths = {'stem': 16, 'classifier': 5}
  outputs = ['stem', 'pool']  # the step of the input is known
  for stage, width in ((1, 16), (2, 32), (3, 64)):
    name = f'stage{stage}_block1'
    widths |= {f'{name}_conv1': width, f'{name}_conv2': width}
    outputs += [f'{name}_conv1', f'{name}_add']
    if placement == 'integer':
      outputs.append(f'{name}_conv2')
    if stage > 1 and pair.build.keywords['shortcut'] == 'conv':
      widths[f'{name}_shortcut'] = width
      if placement == 'integer':
        outputs.append(f'{name}_shortcut')
  if placement == 'paper':
    outputs.remove('stage3_block1_add')
  expected = {name: {'output': ()} for name in outputs}
  if learned:
    for name, width in widths.items():
      expected.setdefault(name, {})['weights'] = (width,)
  return expected


def test_headroom_is_of_activations_of_the_last_stage():
  pair = _pair(1, 'conv')
  decided = pair.plan(4, 'integer')
  _, quant = pair.calibrated(decided)
  wider = quantizers.widen(decided, quant, pair.graph.last_stage, 0.25)
  assert pair.graph.last_stage == {
    f'stage3_block1_{layer}' for layer in ('conv1', 'conv2', 'shortcut', 'add')
  }
  for name, own in quant.items():
    assert wider[name].keys() == own.keys()
    for key, value in own.items():
      late = key == 'output' and name in pair.graph.last_stage
      ratio = 1.25 if late else 1.0
      np.testing.assert_allclose(
        np.exp(wider[name][key]), ratio * np.exp(value), rtol=1e-5
      )


@pytest.mark.parametrize('learned', [True, False])
@pytest.mark.parametrize('placement', ['paper', 'integer'])
@pytest.mark.parametrize(('channels', 'shortcut'), [(3, 'pad'), (1, 'conv')])
def test_quant_collection(channels, shortcut, placement, learned):
  pair = _pair(channels, shortcut)
  decided = pair.plan(4, placement, learned)
  shapes = pair.shapes(fake_quant.layer_set(decided))['quant']
  found = jax.tree.map(lambda a: a.shape, shapes)
  assert found == _expected_quant(pair, placement, learned)


@pytest.mark.parametrize(
  ('channels', 'shortcut', 'placement', 'learned'),
  [(3, 'pad', 'paper', False), (1, 'conv', 'integer', True)],
)
def test_at_8_bits_the_student_is_near_the_teacher(
  channels, shortcut, placement, learned
):
  pair = _pair(channels, shortcut)
  logits, _ = pair.calibrated(pair.plan(8, placement, learned))
  assert 1e-4 < _distance(logits, pair.logits) < 0.03


def test_at_4_bits_the_student_is_farther_off():
  pair = _pair()
  logits, _ = pair.calibrated(pair.plan(4, learned=False))
  assert 0.05 < _distance(logits, pair.logits) < 0.5


def test_at_3_bits_a_corrected_student_is_nearer():
  pair = _pair()
  decided = pair.plan(3)
  student = pair.build(fake_quant.layer_set(decided, calibrate=True))
  tapped = pair.build(float_layers.layer_set(tap=True))

  def calibrated(written):
    @_jit
    def run(variables, x):
      _, taps = tapped.apply(variables, x, mutable=['moments'])
      targets = {
        name: {'input': batch_statistics(found['input'])}
        for name, found in taps['moments'].items()
      }
      variables = {**variables, **({'targets': targets} if written else {})}
      return student.apply(variables, x, mutable=['quant', *written])

    return run(pair.variables, pair.x)

  before, _ = calibrated(())
  after, state = calibrated(('params',))
  assert _distance(after, pair.logits) < 0.8 * _distance(before, pair.logits)
  # What was written is the network that answered, its weights on their grid.
  plain = pair.build(fake_quant.layer_set(decided))
  same = _jit(plain.apply)({**pair.variables, **state}, pair.x)
  np.testing.assert_allclose(same, after, atol=1e-3)
  for name, bits in decided.weights:
    step = np.exp(state['quant'][name]['weights'])
    codes = state['params'][name]['kernel'] / step
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
    assert np.abs(codes).max() < 2 ** (bits - 1) - 0.5


def test_range_of_the_input_is_known_beforehand():
  pair = _pair()
  decided = pair.plan()
  limit = 127 * decided.output('input').step
  student = pair.build(fake_quant.layer_set(decided, calibrate=True))
  apply = _jit(lambda x: student.apply(pair.variables, x, mutable=['quant'])[0])
  low, high = -limit * 128 / 127, limit
  clipped = apply(np.clip(3 * pair.x, low, high))
  np.testing.assert_array_equal(apply(3 * pair.x), clipped)


def test_observing_tells_the_ranges_and_changes_nothing():
  pair = _pair()
  decided = pair.plan(4, learned=False)
  logits, quant = pair.calibrated(decided)
  collections = ['quant', 'batch_stats', 'ranges', 'params']
  observer = pair.build(fake_quant.layer_set(decided, observe=True))
  observe = _jit(functools.partial(observer.apply, mutable=collections))
  before = {**pair.variables, 'quant': quant}
  same, state = observe(before, pair.x)
  np.testing.assert_allclose(same, logits, atol=1e-4)
  ranges = state.pop('ranges')
  assert set(ranges) == {name for name, _ in decided.outputs} - {'input'}
  for name, found in ranges.items():
    # Calibration by largest magnitude on the same images.
    np.testing.assert_allclose(
      found['output'], quant[name]['output'], atol=1e-5
    )
  fainter, state = observe(before, pair.x / 2)
  found = state.pop('ranges')['stem']['output']
  assert found < ranges['stem']['output'] - 0.1
  assert np.abs(fainter - same).max() > 1e-3
  # Neither steps nor, above all, BatchNorm statistics moved.
  assert jax.tree.structure(state) == jax.tree.structure(before)
  for a, b in zip(*map(jax.tree.leaves, (state, before)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_gradients_reach_every_weight_and_step():
  pair = _pair(1, 'conv')
  decided = pair.plan(8, 'integer', learned=True)
  _, quant = pair.calibrated(decided)
  student = pair.build(fake_quant.layer_set(decided))

  @_jit
  def gradient(params, quant, x):
    def total(params, quant):
      variables = {**pair.variables, 'params': params, 'quant': quant}
      return jnp.sum(student.apply(variables, x) * jnp.arange(1.0, 6.0))

    return jax.grad(total, (0, 1))(params, quant)

  to_params, to_quant = gradient(pair.variables['params'], quant, pair.x)
  for path, leaf in jax.tree_util.tree_leaves_with_path((to_params, to_quant)):
    assert np.all(np.isfinite(leaf)), path
    assert np.abs(leaf).max() > 1e-6, path


@pytest.mark.parametrize('shape', [(5, 7, 6, 3), (2, 1, 1, 8)])
def test_scale_and_shift(shape):
  random = np.random.RandomState(0)
  x, g = random.randn(2, *shape).astype(np.float32)
  gain, shift = random.randn(2, shape[-1]).astype(np.float32)

  def both(function):
    y, gradients = jax.vjp(function, x, gain, shift)
    return y, *gradients(g)

  found = both(channels.scale_and_shift)
  for a, b in zip(found, both(lambda x, a, b: x * a + b), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(channels.total(g), g.sum((0, 1, 2)), atol=1e-5)
