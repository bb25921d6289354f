"""Fake-quantized layers, alone and as a student compared with its teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.layers import fake_quant, float_layers, functions
from clusterq_jax.models import cifar_resnet as resnet
from clusterq_jax.models.graph import trace
from clusterq_jax.ops.moments import Statistics, batch_statistics
from clusterq_jax.quant import plan, quantizers
from tests.reference import conv_variables, numpy_batch_norm, numpy_conv

# Whole networks run once here, so compilation takes most of the time.
_jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)
# --- One layer ---------------------------------------------------------------


def _quant_conv(**modes):
  decided = plan.Plan(
    weights=(('conv', 3),),
    outputs=(('conv', plan.Output(4, False)),),
    learned=False,
  )
  return fake_quant.QuantConvBN(
    plan=decided, features=6, kernel=1, act='relu', name='conv', **modes
  )


def test_quantized_conv_by_hand(image):
  variables = conv_variables(1, 4, 6)
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
  h = numpy_batch_norm(numpy_conv(image, kernel, 1, 0), variables)
  codes = np.clip(np.round(h / step), 0, 15)
  # A value in the middle between two codes may round to either code.
  edge = np.abs(h / step % 1 - 0.5) < 1e-3
  assert edge.mean() < 0.02
  np.testing.assert_allclose(
    np.where(edge, 0, y), np.where(edge, 0, step * codes), atol=1e-5
  )
  assert codes.max() == 15  # some values are clipped
  # Gradients pass both quantizers where the output is within its range.
  inside = (h > 0) & (h / step <= 15)
  np.testing.assert_allclose(gradient['bias'], inside.sum((0, 1, 2)), atol=1)
  gain = variables['params']['scale'] / np.sqrt(
    variables['batch_stats']['var'] + 1e-5
  )
  expected = np.einsum('bhwi,bhwo->io', image, inside * gain)
  np.testing.assert_allclose(gradient['kernel'][0, 0], expected, rtol=1e-3)
  params = variables['params']
  normalized = (h - params['bias']) / params['scale']
  np.testing.assert_allclose(
    gradient['scale'],
    (inside * normalized).sum((0, 1, 2)),
    rtol=1e-3,
    atol=0.01,
  )


def test_calibration_replaces_the_step(image):
  variables = conv_variables(1, 4, 6)
  before = {**variables, 'quant': {'output': jnp.log(0.25)}}
  y, state = _quant_conv().apply(before, image, mutable=['quant'])
  assert state['quant']['output'] == before['quant']['output']
  z, state = _quant_conv(calibrate=True).apply(before, image, mutable=['quant'])
  step = np.exp(state['quant']['output'])
  assert z.max() > y.max() == 15 * 0.25
  np.testing.assert_allclose(15 * step, z.max(), rtol=1e-5)


def test_calibration_corrects_batch_norm(image):
  variables = conv_variables(1, 4, 6)
  wanted = Statistics(
    variables['batch_stats']['mean'], jnp.sqrt(variables['batch_stats']['var'])
  )
  targets = {'targets': {'input': wanted}}
  corrected, state = _quant_conv(calibrate=True).apply(
    {**variables, **targets}, image, mutable=['params', 'quant']
  )
  # The written variables alone reproduce the corrected output.
  y = _quant_conv().apply({**variables, **state}, image)
  np.testing.assert_array_equal(y, corrected)
  params = state['params']
  np.testing.assert_array_equal(params['kernel'], variables['params']['kernel'])
  kernel = np.float64(params['kernel'])
  step = np.abs(kernel).max((0, 1, 2)) / 3
  h = numpy_conv(image, np.round(kernel / step) * step, 1, 0)
  before = variables['params']
  ratio = np.clip(wanted.std / h.std((0, 1, 2)), 0.5, 2)
  np.testing.assert_allclose(
    params['scale'], before['scale'] * ratio, rtol=1e-3
  )
  # The input now has the wanted mean, so the output's mean is the bias.
  out = numpy_batch_norm(h, {**variables, 'params': params})
  np.testing.assert_allclose(out.mean((0, 1, 2)), before['bias'], atol=1e-3)


def test_avg_pool_has_a_quantizer(image):
  decided = plan.Plan((), (('pool', plan.Output(8, True)),), learned=True)
  layers = fake_quant.layer_set(decided)
  pool = layers.avg_pool(kernel=2, strides=2, name='pool')
  y = pool.apply({'quant': {'output': jnp.log(0.25)}}, image)
  codes = np.asarray(functions.avg_pool(image, 2, 2)) / 0.25
  np.testing.assert_allclose(y, 0.25 * np.round(codes), atol=1e-6)
  assert np.ptp(np.round(codes)) > 4


# --- Teacher and student -----------------------------------------------------


class _Pair:
  """A ResNet-8 with its variables and its students."""

  def __init__(self, channels, shortcut):
    self.build = functools.partial(
      resnet.CifarResNet, depth=8, num_classes=5, shortcut=shortcut
    )
    self.graph = trace(self.build)
    random = np.random.RandomState(0)
    self.x = random.randn(4, 8, 8, channels).astype(np.float32)

    def fill(path, leaf):
      """Draws kernels of unit gain and positive variances, as if trained."""
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
    """Returns logits and `quant` of a student that calibrates on x."""
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
  """Lists the shapes of the steps of each layer by hand."""
  widths = {'stem': 16, 'classifier': 5}
  outputs = ['stem', 'pool']  # the plan fixes the step of the input
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


def test_headroom_widens_activations_of_the_last_stage():
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


@pytest.mark.slow
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
  # The written variables give the same logits, with weights on their grid.
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
    # Calibration took the largest magnitude on the same images.
    np.testing.assert_allclose(
      found['output'], quant[name]['output'], atol=1e-5
    )
  fainter, state = observe(before, pair.x / 2)
  found = state.pop('ranges')['stem']['output']
  assert found < ranges['stem']['output'] - 0.1
  assert np.abs(fainter - same).max() > 1e-3
  # No variable changed, above all no BatchNorm statistic.
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
