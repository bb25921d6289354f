"""The joint step in eager PyTorch.

Parameters are dicts by their JAX names, in torch's layout. Statistics are
tensors [2, ..., C]: mean and standard deviation. Centroids are tensors
[3, K, C]: averages over samples of the mean, its square and the variance.
"""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.step_time.setting import CLASSES, LATENT, NOISE

A1, A2, A3, BETA = 0.1, 0.9, 0.6, 0.2
EPSILON = 1e-6  # inside square roots
INPUT_LIMIT = 2.0  # largest magnitude of a pixel under mean 0.5, std 0.25


class FakeQuant(torch.autograd.Function):
  """step * clip(round(x / step)): straight-through, LSQ for the step."""

  @staticmethod
  def forward(ctx, x, step, low, high):
    scaled = x / step
    ctx.save_for_backward(scaled)
    ctx.codes, ctx.step_shape = (low, high), step.shape
    return scaled.round().clamp_(low, high).mul_(step)

  @staticmethod
  def backward(ctx, g):
    (scaled,), (low, high) = ctx.saved_tensors, ctx.codes
    code = scaled.round().clamp_(low, high)
    inside = (scaled >= low) & (scaled <= high)
    dstep = g * torch.where(inside, code - scaled, code)
    dx = torch.where(inside, g, 0.0)
    return dx, dstep.sum_to_size(ctx.step_shape), None, None


fake_quant = FakeQuant.apply


def from_jax(path: str, a: np.ndarray) -> np.ndarray:
  """A parameter, or its gradient, in torch's layout."""
  if a.ndim == 4:
    return a.transpose(3, 2, 0, 1)
  if path.endswith('/weights'):
    return a.reshape(-1, *(1,) * (1 if 'classifier' in path else 3))
  if '/dense/' in path:  # its output is an image
    a = np.moveaxis(a.reshape(*a.shape[:-1], 8, 8, -1), -1, -3)
    a = a.reshape(*a.shape[:-3], -1)
  return a.T if path.endswith('/kernel') else a


def tensors(arrays, prefix: str, trained: bool = False) -> dict[str, Any]:
  return {
    path.removeprefix(prefix): torch.tensor(
      from_jax(path, a).copy(), requires_grad=trained
    )
    for path, a in arrays.items()
    if path.startswith(prefix)
  }


def statistic(mean, var):
  return torch.stack([mean, (var + EPSILON).sqrt()])


class Network:
  """ResNet-20: the float teacher, or the student where log steps are given."""

  def __init__(self, params, stats, log_steps=None):
    self.params, self.stats, self.log_steps = params, stats, log_steps or {}

  def quantize(self, x, key, low, high):
    if key not in self.log_steps:
      return x
    return fake_quant(x, self.log_steps[key].exp(), low, high)

  def weight(self, name):
    kernel = self.params[f'{name}/kernel']
    return self.quantize(kernel, f'{name}/weights', -7, 7)

  def conv_bn(self, x, name, stride=1):
    h = F.conv2d(x, self.weight(name), stride=stride, padding=1)
    if not self.log_steps:
      mean = h.mean((2, 3))
      var = h.square().mean((2, 3)) - mean.square()
      self.moments[name] = mean, var.clamp(min=0)
    mean, var = (self.stats[f'{name}/{key}'] for key in ('mean', 'var'))
    gain, bias = (self.params[f'{name}/{key}'] for key in ('scale', 'bias'))
    return F.batch_norm(h, mean, var, gain, bias)

  def relu(self, x, name):
    return self.quantize(F.relu(x, inplace=True), f'{name}/output', 0, 15)

  def __call__(self, x):
    self.moments = {}  # of BatchNorm inputs, teacher only
    if self.log_steps:
      x = fake_quant(x, torch.tensor(INPUT_LIMIT / 127), -128, 127)
    x = self.relu(self.conv_bn(x, 'stem'), 'stem')
    for i in range(9):
      name = f'stage{i // 3 + 1}_block{i % 3 + 1}'
      stride = 2 if i in (3, 6) else 1
      y = self.conv_bn(x, f'{name}_conv1', stride)
      y = self.conv_bn(self.relu(y, f'{name}_conv1'), f'{name}_conv2')
      if stride == 2:
        pad = x.shape[1] // 2
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
      x = self.relu(x + y, f'{name}_add')
    x = self.quantize(x.mean((2, 3)), 'pool/output', 0, 255)
    bias = self.params['classifier/bias']
    return F.linear(x, self.weight('classifier'), bias)


def generate(p, z, labels):
  def batch_norm(x, name):
    gain, bias = p.get(f'{name}/scale'), p.get(f'{name}/bias')
    return F.batch_norm(x, None, None, gain, bias, training=True)

  z = z * F.embedding(labels, p['embedding/embedding'])
  x = F.linear(z, p['dense/kernel'], p['dense/bias']).reshape(len(z), -1, 8, 8)
  x = batch_norm(x, 'bn0')
  for i in (1, 2):
    x = F.interpolate(x, scale_factor=2)
    x = batch_norm(F.conv2d(x, p[f'conv{i}/kernel'], padding=1), f'bn{i}')
    x = F.leaky_relu(x, 0.2, inplace=True)
  x = F.conv2d(x, p['conv_out/kernel'], p['bias_out'], padding=1)
  return batch_norm(torch.tanh(x), 'bn_out')


def augment(x):
  """Random resized crop (area 0.8-1, aspect 3/4-4/3) and flip."""
  area = torch.empty(len(x)).uniform_(0.8, 1.0)
  aspect = torch.empty(len(x)).uniform_(-0.2877, 0.2877).exp()
  size = torch.stack([area * aspect, area / aspect], 1).sqrt().clamp(max=1)
  theta = torch.zeros(len(x), 2, 3)
  theta[:, :, 2] = (2 * torch.rand_like(size) - 1) * (1 - size)
  theta[:, 0, 0] = size[:, 0] * (1 - 2 * torch.randint(2, (len(x),)))
  theta[:, 1, 1] = size[:, 1]
  grid = F.affine_grid(theta, x.shape, align_corners=False)
  return F.grid_sample(x, grid, padding_mode='border', align_corners=False)


class TorchStep:
  """The joint step; `fixed`, (z, labels), switches its randomness off."""

  def __init__(self, args, arrays, fixed=None):
    self.batch_size, self.fixed = args.batch_size, fixed
    stats = tensors(arrays, 'teacher/batch_stats/')
    self.teacher = Network(tensors(arrays, 'teacher/params/'), stats)
    self.params = tensors(arrays, 'state/student/params/', trained=True)
    self.quant = tensors(arrays, 'state/student/quant/', trained=True)
    self.student = Network(self.params, stats, self.quant)
    self.generator = tensors(arrays, 'state/generator/', trained=True)
    layers = list(tensors(arrays, 'state/centroids/layers/').values())
    triples = zip(layers[::3], layers[1::3], layers[2::3], strict=True)
    self.centroids = [torch.stack(triple) for triple in triples]
    self.seen = tensors(arrays, 'state/centroids/seen')['']
    adam, groups = torch.optim.Adam, [(self.params, 1e-4), (self.quant, 1e-3)]
    self.generator_adam = adam(self.generator.values(), 1e-3, (0.5, 0.999))
    self.student_adam = adam(
      {'params': list(p.values()), 'lr': lr} for p, lr in groups
    )

  def __call__(self):
    terms, *batch = self.generator_step()
    return {**terms, **self.student_step(*batch)}

  def generator_step(self):
    z, labels = self.fixed or (
      torch.randn(self.batch_size, LATENT),
      torch.randint(CLASSES, (self.batch_size,)),
    )
    x = generate(self.generator, z, labels)
    logits = self.teacher(x if self.fixed else (x := augment(x)))
    moments, self.teacher.moments = self.teacher.moments, {}
    inception, bn = F.cross_entropy(logits, labels), 0.0
    for name, (mean, var) in moments.items():
      keys = f'{name}/mean', f'{name}/var'
      stored = statistic(*(self.teacher.stats[key] for key in keys))
      var = var.mean(0) + mean.var(0, correction=0)
      bn += (statistic(mean.mean(0), var) - stored).square().sum(0).mean()
    bn = bn / len(moments)
    classes = Classes(labels, logits, x.dtype)
    semantic = list(moments.values())[-len(self.centroids) :]
    found = [classes.statistic(*m) for m in semantic]
    expected = [classes.expected(c) for c in self.centroids]
    noise = torch.tensor((0.0, 0.0) if self.fixed else NOISE)[:, None, None]
    noisy = [
      e + noise * torch.randn_like(e)[:, classes.first] for e in expected
    ]
    noisy = [torch.stack([c[0], c[1].clamp(min=0)]) for c in noisy]
    share = classes.share * self.seen[labels]
    sfda = class_loss(found, expected, share)
    diversity = class_loss(found, noisy, share)
    loss = inception + A1 * bn + A2 * sfda + A3 * diversity
    self.generator_adam.zero_grad()
    loss.backward()
    self.generator_adam.step()
    rows = labels[classes.share > 0]  # equal where of one class
    weight = torch.where(self.seen[rows], BETA, 1.0)[:, None]
    for old, (mean, var) in zip(self.centroids, semantic, strict=True):
      raw = torch.stack([mean, mean.square(), var]).detach()
      new = (classes.together @ raw)[:, classes.share > 0]
      old[:, rows] = old[:, rows].lerp(new, weight)
    self.seen[rows] = True
    names = ('inception', 'statistics', 'sfda', 'diversity')
    values = (v.detach() for v in (inception, bn, sfda, diversity))
    terms = {f'generator/{n}': v for n, v in zip(names, values, strict=True)}
    return terms, x.detach(), labels, logits.detach()

  def student_step(self, x, labels, teacher_logits):
    logits = self.student(x)
    entropy = F.cross_entropy(logits, labels)
    student, teacher = (F.log_softmax(a, 1) for a in (logits, teacher_logits))
    kl = F.kl_div(student, teacher, reduction='batchmean', log_target=True)
    self.student_adam.zero_grad()
    (entropy + kl).backward()
    self.student_adam.step()
    entropy, kl = entropy.detach(), kl.detach()
    return {'student/cross_entropy': entropy, 'student/distillation': kl}


class Classes:
  """Groups a batch by class, see `class_statistics.Classes`."""

  def __init__(self, labels, logits, dtype):
    self.labels = labels
    same = (labels[:, None] == labels) & (logits.argmax(1) == labels)
    count = same.sum(1).clamp(min=1).to(dtype)
    self.together = same / count[:, None]
    self.between = (1 - 1 / count)[:, None]
    self.first = same.to(dtype).argmax(1)
    self.share = self.together.diagonal()

  def statistic(self, mean, var):
    own = self.together @ mean
    return statistic(own, self.together @ (var + (mean - own).square()))

  def expected(self, centroid):
    mean, square, var = centroid[:, self.labels]
    between = (square - mean.square()).clamp(min=0)
    return statistic(mean, var + self.between * between)


def class_loss(found, expected, share):
  pairs = zip(found, expected, strict=True)
  total = sum((a - b).square().sum(0).mean(-1) for a, b in pairs)
  return (share * total).sum() / len(found)
