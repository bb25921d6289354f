"""The steps in PyTorch: the same work as ours."""

import jax
import numpy as np
import pytest

from clusterq_jax.quant import numerics

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.torch

from benchmarks.step_time import torch_networks  # noqa: E402

_FORMS = torch_networks.fake_quant, torch_networks.traced_fake_quant


@pytest.mark.parametrize('form', _FORMS)
@pytest.mark.parametrize('shape', [(), (6, 1, 1, 1)])
@pytest.mark.parametrize('layout', ['contiguous_format', 'channels_last'])
@pytest.mark.parametrize('codes', [(0, 15), (-7, 7), (-128, 127)])
def test_fake_quant(form, shape, layout, codes):
  rng = np.random.RandomState(0)
  x = rng.uniform(1.3 * codes[0], 1.3 * codes[1], (6, 4, 5, 5))
  x.flat[:2] = codes  # at the ends of the range, gradients pass
  x, g = np.float32(0.25 * x), np.float32(rng.randn(*x.shape))
  step = np.full(shape, 0.25, np.float32)

  def ours(x, step):  # [..., O] and [O]
    return numerics.fake_quant(x.T, step.ravel() if shape else step, *codes).T

  y, gradients = jax.vjp(ours, x, step)
  their_x = torch.tensor(x).contiguous(memory_format=getattr(torch, layout))
  theirs = [a.requires_grad_() for a in (their_x, torch.tensor(step))]
  their_y = form(*theirs, *codes)
  their_y.backward(torch.tensor(g))
  np.testing.assert_array_equal(their_y.detach(), y)
  for a, b in zip(theirs, gradients(g), strict=True):
    np.testing.assert_allclose(a.grad, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('step', ['joint', 'student'])
def test_the_same_work(spawn, step):
  process = spawn(
    *('-m', 'benchmarks.step_time', '--check', f'--step={step}'),
    *('--torch=eager', '--batch_size=24'),
  )
  output, errors = process.communicate()
  assert process.returncode == 0, output + errors
  assert output.count('the same work') == 2  # one for each memory format
