"""What both steps in PyTorch use: arrays, fake quantization, ResNet-20.

Parameters are dicts by their JAX names, in torch's layout. Images are
[B, C, H, W].
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F


class FakeQuant(torch.autograd.Function):
  """step * clip(round(x / step)): straight-through, LSQ for the step.

  This form has few passes over memory, which take the time in eager PyTorch:
  half as many as one with comparisons and `torch.where`.
  """

  @staticmethod
  def forward(ctx, x, step, low, high):
    y = (x / step).clamp_(low, high).round_().mul_(step)
    ctx.save_for_backward(x, y, step)
    ctx.codes = low, high
    return y

  @staticmethod
  def backward(ctx, g):
    (x, y, step), (low, high) = ctx.saved_tensors, ctx.codes
    if step.ndim:
      scaled = x / step
      dx = torch.where((scaled >= low) & (scaled <= high), g, 0.0)
    else:
      # The ends belong to our range, but not to that of hardtanh.
      infinity = torch.tensor(math.inf, dtype=x.dtype)
      below = torch.nextafter(low * step, -infinity)
      above = torch.nextafter(high * step, infinity)
      dx = torch.ops.aten.hardtanh_backward(g, x, below.item(), above.item())
    if not ctx.needs_input_grad[1]:
      return dx, None, None, None
    if step.ndim:
      dstep = (g * y - dx * x).sum_to_size(step.shape)
    else:
      dstep = _inner(g, y) - _inner(dx, x)
    return dx, dstep / step, None, None


fake_quant = FakeQuant.apply


def _inner(a, b):
  """Sums a * b, in one pass if both lie in memory in the same order."""
  if a.stride() == b.stride() and any(
    a.is_contiguous(memory_format=layout)
    for layout in (torch.contiguous_format, torch.channels_last)
  ):
    return torch.dot(*(t.as_strided((t.numel(),), (1,)) for t in (a, b)))
  return (a * b).sum()


def traced_fake_quant(x, step, low, high):
  """Does what `FakeQuant` does, in a form that torch.compile fuses."""
  clipped = (x / step).clamp(low, high)
  return step * (clipped + (clipped.round() - clipped).detach())


def from_jax(path: str, a: np.ndarray) -> np.ndarray:
  """Returns a parameter, or its gradient, in torch's layout."""
  if a.ndim == 4:
    return a.transpose(3, 2, 0, 1)
  if path.endswith('/weights'):
    return a.reshape(-1, *(1,) * (1 if 'classifier' in path else 3))
  if '/dense/' in path:  # its output is an image
    a = np.moveaxis(a.reshape(*a.shape[:-1], 8, 8, -1), -1, -3)
    a = a.reshape(*a.shape[:-3], -1)
  return a.T if path.endswith('/kernel') else a


class Inputs:
  """The arrays that the JAX side made, as tensors.

  Attributes:
    arrays: by path.
    layout: memory format of images and kernels.
  """

  def __init__(self, arrays: dict[str, np.ndarray], layout):
    self.arrays, self.layout = arrays, layout

  def tensors(self, prefix: str, trained: bool = False) -> dict[str, Any]:
    """Returns the tensors below a prefix, by the rest of their path."""
    found = {}
    for path, array in self.arrays.items():
      if path.startswith(prefix):
        a = torch.tensor(from_jax(path, array).copy())
        if a.ndim == 4:
          a = a.contiguous(memory_format=self.layout)
        found[path.removeprefix(prefix)] = a.requires_grad_(trained)
    return found

  def constant(self, name: str) -> Any:
    """Returns a number of the config."""
    return self.arrays[f'constants/{name}'].item()

  def codes(self) -> dict[str, tuple[int, int]]:
    """Returns smallest and largest code of each quantizer, by its path."""
    prefix = 'constants/codes/'
    return {
      path.removeprefix(prefix): tuple(pair.tolist())
      for path, pair in self.arrays.items()
      if path.startswith(prefix)
    }


class Answers(NamedTuple):
  """What a network says about B images.

  Attributes:
    logits: [B, K].
    features: output of each layer with BatchNorm, after its activation and
      quantizer, [B, C_l, H_l, W_l].
    moments: mean and variance of each BatchNorm's input, [B, C_l] each, by
      name; empty unless the network taps them.
  """

  logits: torch.Tensor
  features: list[torch.Tensor]
  moments: dict[str, tuple[torch.Tensor, torch.Tensor]]


class Quantizers(NamedTuple):
  """The quantizers of a student.

  Attributes:
    log_steps: logarithms of steps, by path of the quantizer.
    codes: smallest and largest code, by path of the quantizer.
    input_step: step of the network input, [].
    function: fake quantization, of (x, step, low, high).
  """

  log_steps: dict[str, torch.Tensor]
  codes: dict[str, tuple[int, int]]
  input_step: torch.Tensor
  function: Any

  def __call__(self, x, path):
    """Quantizes x if there is a quantizer with this path."""
    if path not in self.codes:
      return x
    step = self.input_step
    if path in self.log_steps:
      step = self.log_steps[path].exp()
    return self.function(x, step, *self.codes[path])


class Network:
  """ResNet-20: the float teacher, or the student where quantizers are given.

  Attributes:
    params: kernels, gains and biases.
    stats: BatchNorm statistics.
    quantizers: those of a student, or None.
    tap: whether answers have the moments of BatchNorm inputs.
  """

  def __init__(self, params, stats, quantizers=None, tap=False):
    self.params, self.stats = params, stats
    self.quantizers, self.tap = quantizers, tap

  def _quantize(self, x, path):
    return x if self.quantizers is None else self.quantizers(x, path)

  def _weight(self, name):
    return self._quantize(self.params[f'{name}/kernel'], f'{name}/weights')

  def __call__(self, x) -> Answers:
    features, moments = [], {}

    def conv_bn(x, name, stride=1, relu=True):
      h = F.conv2d(x, self._weight(name), stride=stride, padding=1)
      if self.tap:
        mean = h.mean((2, 3))
        var = h.square().mean((2, 3)) - mean.square()
        moments[name] = mean, var.clamp(min=0)
      mean, var = (self.stats[f'{name}/{key}'] for key in ('mean', 'var'))
      gain, bias = (self.params[f'{name}/{key}'] for key in ('scale', 'bias'))
      h = F.batch_norm(h, mean, var, gain, bias)
      h = F.relu(h, inplace=True) if relu else h
      features.append(self._quantize(h, f'{name}/output'))
      return features[-1]

    x = conv_bn(self._quantize(x, 'input/output'), 'stem')
    for i in range(9):
      name = f'stage{i // 3 + 1}_block{i % 3 + 1}'
      stride = 2 if i in (3, 6) else 1
      y = conv_bn(x, f'{name}_conv1', stride)
      y = conv_bn(y, f'{name}_conv2', relu=False)
      if stride == 2:
        pad = x.shape[1] // 2
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
      x = F.relu(x + y, inplace=True)
      x = self._quantize(x, f'{name}_add/output')
    x = self._quantize(x.mean((2, 3)), 'pool/output')
    bias = self.params['classifier/bias']
    logits = F.linear(x, self._weight('classifier'), bias)
    return Answers(logits, features, moments)
