"""Values and gradients of fake quantization, and the choice of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.quant import numerics


def _numpy_quant(x, step, low, high):
  """Finds the nearest representable values in float64."""
  grid = np.asarray(step, np.float64)[..., None] * np.arange(low, high + 1)
  x = np.asarray(x, np.float64)[..., None]
  grid = np.broadcast_to(grid, (*x.shape[:-1], grid.shape[-1]))
  nearest = np.argmin(np.abs(x - grid), -1)[..., None]
  return np.take_along_axis(grid, nearest, -1)[..., 0]


def _errors(x, step, low, high):
  """Computes the mean squared error of each channel (last axis)."""
  error = np.square(x - _numpy_quant(x, step, low, high))
  return error.reshape(-1, x.shape[-1]).mean(0)


@pytest.mark.parametrize(('low', 'high'), [(-3, 3), (0, 7), (-4, 3)])
def test_values(low, high):
  x = np.random.RandomState(0).randn(40, 3).astype(np.float32)
  step = np.array([0.1, 0.3, 1.7], np.float32)
  np.testing.assert_allclose(
    numerics.fake_quant(x, step, low, high),
    _numpy_quant(x, step, low, high),
    atol=1e-6,
  )


@pytest.mark.parametrize(('low', 'high'), [(-3, 3), (0, 7), (-4, 3)])
def test_straight_through_inside_the_range_only(low, high):
  step = 0.5  # exact in binary, so that the bounds are hit exactly
  codes = [low - 9, low - 0.25, low, low + 0.25, low + 1]
  codes += [high - 0.25, high, high + 0.25, high + 9]
  inside = [0, 0, 1, 1, 1, 1, 1, 0, 0]
  g = jnp.arange(1.0, 10.0)
  x = step * jnp.asarray(codes)
  dx = jax.grad(
    lambda x: jnp.sum(g * numerics.fake_quant(x, jnp.asarray(step), low, high))
  )(x)
  np.testing.assert_array_equal(dx, g * np.asarray(inside))


def _numpy_step_gradient(x, step, low, high, g):
  """Computes eq. 3 of LSQ element by element; step [C]."""
  total = np.zeros(len(step))
  for index in np.ndindex(x.shape):
    channel = index[-1]
    v = float(x[index]) / float(step[channel])
    slope = low if v <= low else high if v >= high else np.rint(v) - v
    total[channel] += float(g[index]) * slope
  return total


@pytest.mark.parametrize(('low', 'high'), [(-3, 3), (0, 7)])
def test_step_gradient_is_lsq(low, high):
  random = np.random.RandomState(1)
  x = random.randn(4, 5, 3).astype(np.float32)
  g = random.randn(4, 5, 3).astype(np.float32)
  step = np.array([0.1, 0.3, 2.0], np.float32)

  def gradient(step):
    return jax.grad(
      lambda s: jnp.sum(g * numerics.fake_quant(x, s, low, high))
    )(step)

  expected = _numpy_step_gradient(x, step, low, high, g)
  np.testing.assert_allclose(gradient(step), expected, rtol=1e-4)
  scalar = gradient(jnp.asarray(0.3))
  assert scalar.shape == ()
  expected = _numpy_step_gradient(x, [0.3] * 3, low, high, g).sum()
  np.testing.assert_allclose(scalar, expected, rtol=1e-4)


@pytest.mark.parametrize('bits', numerics.BITS)
def test_weights_are_narrow_and_symmetric(bits):
  largest = 2 ** (bits - 1) - 1
  low, high = numerics.weight_range(bits)
  assert (low, high) == (-largest, largest)
  w = np.linspace(-1, 1, 1001, dtype=np.float32)[:, None] * [0.2, 3.0]
  for step in (
    numerics.max_step(w, high, (0,)),
    numerics.mse_step(w, low, high, (0,)),
  ):
    q = np.asarray(numerics.fake_quant(w, step, low, high))
    for channel in range(2):
      values = np.unique(q[:, channel])
      assert len(values) == 2**bits - 1
      np.testing.assert_array_equal(values, -values[::-1])
    np.testing.assert_array_equal(numerics.fake_quant(-w, step, low, high), -q)


@pytest.mark.parametrize(
  ('bits', 'signed', 'codes'),
  [
    (2, False, (0, 3)),
    (2, True, (-2, 1)),
    (4, False, (0, 15)),
    (4, True, (-8, 7)),
    (8, False, (0, 255)),
    (8, True, (-128, 127)),
  ],
)
def test_activation_range(bits, signed, codes):
  assert numerics.activation_range(bits, signed) == codes


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_max_step_error_is_half_a_step(bits):
  w = np.random.RandomState(2).standard_t(2, (3, 3, 8, 5)).astype(np.float32)
  low, high = numerics.weight_range(bits)
  step = numerics.max_step(w, high, (0, 1, 2))
  assert step.shape == (5,)
  np.testing.assert_allclose(
    step, np.abs(w).reshape(-1, 5).max(0) / high, rtol=1e-5
  )
  error = np.abs(w - numerics.fake_quant(w, step, low, high))
  assert np.all(error <= np.asarray(step) / 2 * (1 + 1e-5))


@pytest.mark.parametrize('through_log', [False, True])
def test_largest_weight_keeps_its_gradient(through_log):
  # In float32, max / (max / high) exceeds high for some values of max.
  w = np.random.RandomState(4).randn(1, 3000).astype(np.float32)

  @jax.jit
  def gradient(w):
    step = jax.lax.stop_gradient(numerics.max_step(w, 7, (0,)))
    step = jnp.exp(jnp.log(step)) if through_log else step
    return jax.grad(lambda w: jnp.sum(numerics.fake_quant(w, step, -7, 7)))(w)

  np.testing.assert_array_equal(gradient(w), np.ones_like(w))


@pytest.mark.parametrize(
  ('low', 'high'), [(-1, 1), (-7, 7), (-127, 127), (0, 15), (-8, 7)]
)
def test_mse_step_is_the_best_clip(low, high):
  x = np.random.RandomState(3).laplace(size=(512, 6)).astype(np.float32)
  x *= np.array([0.01, 0.1, 1, 1, 10, 100], np.float32)
  x = np.maximum(x, 0) if low == 0 else x
  widest = np.abs(x).max(0) / high
  found = _errors(x, numerics.mse_step(x, low, high, (0,)), low, high)
  largest = _errors(x, numerics.max_step(x, high, (0,)), low, high)
  assert np.all(found <= largest * (1 + 1e-5))
  if high <= 15:  # clipping reduces the error at few bits
    assert np.mean(found / largest) < 0.95
  clips = np.linspace(0.02, 1, 200)
  best = np.min([_errors(x, c * widest, low, high) for c in clips], 0)
  assert np.all(found <= 1.1 * best)


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('skew', [-1.0, 0.0, 1.0])
def test_mse_zero_point(bits, skew):
  random = np.random.RandomState(5)
  # Channels differ in their spread, so every channel must be in the sample.
  x = random.randn(9_001, 16) * np.linspace(0.5, 1.5, 16) + skew
  x = (3 * x).astype(np.float32)
  step, zero = numerics.mse_zero_point(x, bits)
  assert zero == np.rint(zero)
  assert 0 <= zero <= 2**bits - 1
  assert np.sign(2 ** (bits - 1) - 0.5 - zero) == np.sign(skew) or not skew
  found = _errors(x, step, -zero, 2**bits - 1 - zero)
  codes = numerics.activation_range(bits, signed=True)
  centred = _errors(x, numerics.mse_step(x, *codes, (0, 1)), *codes)
  # Codes without a zero point have one more value below zero than above.
  assert np.mean(found) < (0.9 if skew > 0 else 1.01) * np.mean(centred)


def test_mse_zero_point_looks_at_every_channel():
  x = np.zeros((9_000, 24), np.float32)  # the sample has every third value
  x[:, 1] = np.linspace(0, 15, len(x))
  step, zero = numerics.mse_zero_point(x, 4)
  assert 0.8 < step < 1.2
  assert zero == 0


def test_mse_step_is_a_constant():
  x = jnp.linspace(-1, 2, 12).reshape(6, 2)
  g = jax.grad(lambda x: jnp.sum(numerics.mse_step(x, -3, 3, (0,))))(x)
  np.testing.assert_array_equal(g, np.zeros((6, 2)))


@pytest.mark.parametrize('codes', [(-1, 1), (0, 255), (-128, 127)])
def test_zero_is_representable(codes):
  x = jnp.asarray([0.0, 1.0, 0.0, -3.3, 0.0])
  q = numerics.fake_quant(x, jnp.asarray(0.0137), *codes)
  assert q[0] == q[2] == q[4] == 0
  assert q[1] > 0


def test_all_zero_tensor():
  x = jnp.zeros((7, 2))
  for step in (
    numerics.max_step(x, 7, (0,)),
    numerics.mse_step(x, -7, 7, (0,)),
  ):
    assert np.all(np.isfinite(jnp.log(step)))
    q, pullback = jax.vjp(
      lambda x, s: numerics.fake_quant(x, s, -7, 7), x, step
    )
    np.testing.assert_array_equal(q, x)
    for gradient in pullback(jnp.ones_like(x)):
      assert np.all(np.isfinite(gradient))
  # A channel of zeros does not change the step of another channel.
  x = x.at[:, 1].set(jnp.arange(7.0))
  np.testing.assert_allclose(numerics.max_step(x, 3, (0,))[1], 2, rtol=1e-5)
