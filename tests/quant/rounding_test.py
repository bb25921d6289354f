"""Rounding that preserves a layer's outputs."""

import jax
import numpy as np

from clusterq_jax.quant import rounding

_LOW, _HIGH = -7, 7
_STEP = 0.1


@jax.jit
def _compensate(kernel, patches, step):
  return rounding.compensate(
    kernel,
    lambda: rounding.measure(lambda x: x, patches[None]),
    step,
    _LOW,
    _HIGH,
  )


def _inputs(count, groups, inputs, seed=0):
  """Draws correlated inputs, with different correlations in each group."""
  random = np.random.RandomState(seed)
  mix = random.randn(groups, inputs, inputs)
  mix[:, :, 0] += 3  # a part that all inputs of a group share
  draws = random.randn(count, groups, inputs)
  return np.einsum('gnm,pgm->pgn', mix, draws).astype(np.float32)


def _kernel(*shape):
  return (0.25 * np.random.RandomState(3).randn(*shape)).astype(np.float32)


def _nearest(kernel):
  return _STEP * np.clip(np.round(kernel / _STEP), _LOW, _HIGH)


def test_output_errors_are_smaller_than_of_nearest_rounding():
  patches, kernel = _inputs(400, 1, 12), _kernel(12, 5)
  unseen = _inputs(800, 1, 12)[400:, 0]
  rounded = np.asarray(_compensate(kernel, patches, np.full(5, _STEP)))
  codes = rounded / _STEP
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
  assert np.abs(codes).max() < _HIGH + 0.5

  def error(other):
    return np.mean(np.square(unseen @ (other - kernel)))

  assert error(rounded) < 0.5 * error(_nearest(kernel))


def test_each_step_is_the_best_that_is_left():
  """Compares with a least-squares solution for every rounded input."""
  patches, kernel = _inputs(50, 1, 6), _kernel(6, 1)
  rows = np.float64(patches[:, 0])
  moments = rows.T @ rows / len(rows)
  power = np.mean(np.diag(moments))
  moments += (0.01 + 6 / 50) * power * np.eye(6)
  weights, free = np.float64(kernel[:, 0]).copy(), list(range(6))
  for i in np.argsort(-np.diag(moments)):
    before = weights.copy()
    weights[i] = _nearest(weights[i])
    free.remove(i)
    # The free weights change to minimise the output error of weight i.
    pull = moments[np.ix_(free, [i])][:, 0] * (weights[i] - before[i])
    weights[free] -= np.linalg.solve(moments[np.ix_(free, free)], pull)
  rounded = _compensate(kernel, patches, np.full(1, _STEP))
  np.testing.assert_allclose(rounded[:, 0], weights, atol=1e-5)


def test_inputs_without_correlation_leave_nearest_rounding():
  patches = np.eye(8, dtype=np.float32)[:, None].repeat(50, 0)
  kernel = _kernel(8, 3)
  rounded = _compensate(kernel, patches, np.full(3, _STEP))
  np.testing.assert_allclose(rounded, _nearest(kernel), atol=1e-6)


def test_few_outputs_leave_nearest_rounding():
  """Two output pixels say too little about the correlations of 12 inputs."""
  kernel = _kernel(12, 5)
  rounded = _compensate(kernel, _inputs(2, 1, 12), np.full(5, _STEP))
  assert np.mean(np.abs(rounded - _nearest(kernel)) > 1e-5) < 0.3


def test_inputs_that_never_vary():
  patches = _inputs(100, 1, 6)
  patches[:, :, :2] = 0
  for x in (patches, np.zeros_like(patches)):
    rounded = _compensate(_kernel(6, 2), x, np.full(2, _STEP))
    np.testing.assert_allclose(
      rounded[:2], _nearest(_kernel(6, 2))[:2], atol=1e-6
    )


def test_groups_are_rounded_on_their_own():
  patches, kernel = _inputs(90, 3, 4), _kernel(2, 2, 1, 6)
  step = np.linspace(0.05, 0.15, 6)
  whole = _compensate(kernel, patches, step)
  for group in range(3):
    own = slice(2 * group, 2 * group + 2)
    alone = _compensate(
      kernel[..., own], patches[:, group : group + 1], step[own]
    )
    np.testing.assert_allclose(whole[..., own], alone, atol=1e-6)


def test_batches_are_measured_like_their_whole():
  patches = _inputs(60, 3, 4)
  moments, pixels = rounding.measure(
    lambda x: 2 * x, patches.reshape(5, 12, 3, 4)
  )
  assert pixels == 60
  expected = 4 * np.einsum('pgn,pgm->gnm', patches, patches) / 60
  np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-4)


def test_too_many_inputs_are_not_measured():
  kernel = np.full((9000, 1), 0.26, np.float32)

  def inputs():
    raise AssertionError

  rounded = rounding.compensate(kernel, inputs, np.full(1, _STEP), _LOW, _HIGH)
  np.testing.assert_allclose(rounded, 0.3, atol=1e-6)
