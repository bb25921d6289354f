"""The joint and the student step in PyTorch, eager or compiled.

Images are [B, C, H, W]. Statistics are tensors [2, ..., C]: mean and standard
deviation. Centroids are tensors [3, K, C]: averages over samples of the mean,
its square and the variance.

`torch.compile` gets the losses of the networks, forward and backward. The
optimisers, the update of the centroids and the draw of images stay outside.
"""

import functools

import torch
from torch.nn import functional as F

from benchmarks.step_time import torch_networks
from benchmarks.step_time.setting import CLASSES, LATENT, NOISE
from benchmarks.step_time.torch_networks import Inputs, Network, Quantizers

A1, A2, A3, BETA = 0.1, 0.9, 0.6, 0.2
EPSILON = 1e-6  # inside square roots and below fractions


class _Step:
  """What both steps have: teacher, student, and the student's optimiser.

  Attributes:
    params: parameters of the student.
    quant: logarithms of the steps of the student's quantizers.
  """

  def __init__(self, arrays, batch, variant, channels_last, fixed=None):
    self.batch, self.fixed = batch, fixed
    self.layout = (
      torch.channels_last if channels_last else torch.contiguous_format
    )
    self.inputs = Inputs(arrays, self.layout)
    constant, compiled = self.inputs.constant, variant == 'compile'
    self.stats = self.inputs.tensors('teacher/batch_stats/')
    self.params = self.inputs.tensors('state/student/params/', trained=True)
    self.quant = self.inputs.tensors('state/student/quant/', trained=True)
    quantizers = Quantizers(
      self.quant,
      self.inputs.codes(),
      torch.tensor(constant('input_step')),
      torch_networks.traced_fake_quant
      if compiled
      else torch_networks.fake_quant,
    )
    self.student = Network(self.params, self.stats, quantizers)
    groups = (self.params, 'rate/params'), (self.quant, 'rate/quant')
    self.student_adam = torch.optim.Adam(
      [{'params': list(p.values()), 'lr': constant(n)} for p, n in groups],
      fused=True,
    )
    # `fullgraph`: a break of the graph would cost time unnoticed.
    self.compiled = (
      functools.partial(torch.compile, fullgraph=True, dynamic=False)
      if compiled
      else lambda function: function
    )

  def teacher(self, tap=False) -> Network:
    """Returns the teacher; `tap`: with moments of BatchNorm inputs."""
    params = self.inputs.tensors('teacher/params/')
    return Network(params, self.stats, tap=tap)

  def update(self, optimizer, loss):
    """Moves what an optimiser trains down the gradient of a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _named(owner, terms):
  return {f'{owner}/{name}': term.detach() for name, term in terms.items()}


def _divergence(logits, teacher_logits):
  student, teacher = (F.log_softmax(a, 1) for a in (logits, teacher_logits))
  return F.kl_div(student, teacher, reduction='batchmean', log_target=True)


def mean_square(x):
  return torch.linalg.vector_norm(x).square() / x.numel()


class StudentStep(_Step):
  """The student step; `fixed`, (rows, ratio, size), are its random numbers.

  Attributes:
    moved: images that the last step moved, [M, C, H, W].
  """

  def __init__(self, arrays, *args):
    super().__init__(arrays, *args)
    self.pool = torch.tensor(arrays['state/pool'])
    self.mean, self.std = (
      torch.tensor(arrays[f'constants/{name}']).to(torch.get_default_dtype())
      for name in ('mean', 'std')
    )
    moved = torch.tensor(arrays['state/moved']).to(self.mean.dtype)
    self.moved = moved.permute(0, 3, 1, 2)
    teacher = self.teacher()
    weight = self.inputs.constant('features')

    def losses(x):
      with torch.no_grad():
        theirs = teacher(x)
        labels = theirs.logits.argmax(1)
      own = self.student(x)
      entropy = F.cross_entropy(own.logits, labels)
      kl = _divergence(own.logits, theirs.logits)
      errors = [
        F.mse_loss(s, t) / (mean_square(t) + EPSILON)
        for s, t in zip(own.features, theirs.features, strict=True)
      ]
      features = sum(errors) / len(errors)
      agreement = (own.logits.argmax(1) == labels).to(kl.dtype).mean()
      return {
        'cross_entropy': entropy,
        'distillation': kl,
        'agreement': agreement,
        'features': features,
        'loss': kl + weight * features,
      }

    self.losses = self.compiled(losses)

  def draw(self):
    """Returns rows of the pool, ratios of mixup, sizes of the moves."""
    moved = len(self.moved)
    shape = self.batch - moved, 1, 1, 1
    on = torch.rand(shape) < self.inputs.constant('mixup')
    largest = self.inputs.constant('adversarial')
    return (
      torch.randint(len(self.pool), shape[:1]),
      torch.where(on, torch.rand(shape), 0.0),
      largest * torch.rand(moved, 1, 1, 1),
    )

  def __call__(self):
    rows, ratio, size = self.fixed or self.draw()
    x = (self.pool[rows].float() * (1 / 255) - self.mean) / self.std
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=self.layout)
    x += ratio * (x.flip(0) - x)
    x = torch.cat([x, self.moved]).contiguous(memory_format=self.layout)
    x.requires_grad_()
    terms = self.losses(x)
    self.update(self.student_adam, terms['loss'])
    ahead = slice(len(self.moved))
    self.moved = x.detach()[ahead] + size * x.grad[ahead].sign()
    return _named('student', terms)


class JointStep(_Step):
  """The joint step; `fixed`, (z, labels), switches its randomness off."""

  def __init__(self, arrays, *args):
    super().__init__(arrays, *args)
    self.generator = self.inputs.tensors('state/generator/', trained=True)
    layers = self.inputs.tensors('state/centroids/layers/').values()
    triples = zip(*[iter(layers)] * 3, strict=True)
    self.centroids = [torch.stack(triple) for triple in triples]
    self.seen = self.inputs.tensors('state/centroids/seen')['']
    self.generator_adam = torch.optim.Adam(
      self.generator.values(), 1e-3, (0.5, 0.999), fused=True
    )
    self.tapped = self.teacher(tap=True)
    self.l2, self.l3 = map(self.compiled, (self._l2, self._l3))

  def __call__(self):
    z, labels = self.fixed or (
      torch.randn(self.batch, LATENT),
      torch.randint(CLASSES, (self.batch,)),
    )
    terms, x, logits, raw, share = self.l2(z, labels)
    self.update(self.generator_adam, terms['loss'])
    self.move_centroids(labels, raw, share)
    own = self.l3(x.detach(), labels, logits.detach())
    self.update(self.student_adam, own['loss'])
    return _named('generator', terms) | _named('student', own)

  def _l2(self, z, labels):
    """Returns the terms of the loss, images, logits and new centroids."""
    x = generate(self.generator, z, labels, self.layout)
    x = x if self.fixed else augment(x)
    x = x.contiguous(memory_format=self.layout)
    logits, _, moments = self.tapped(x)
    inception, bn = F.cross_entropy(logits, labels), 0.0
    for name, (mean, var) in moments.items():
      keys = f'{name}/mean', f'{name}/var'
      stored = statistic(*(self.stats[key] for key in keys))
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
    terms = {
      'inception': inception,
      'statistics': bn,
      'sfda': sfda,
      'diversity': diversity,
      'loss': inception + A1 * bn + A2 * sfda + A3 * diversity,
    }
    raw = [
      classes.together @ torch.stack([m, m.square(), v]).detach()
      for m, v in semantic
    ]
    return terms, x, logits, raw, classes.share

  def _l3(self, x, labels, teacher_logits):
    """Returns the terms of the student's loss."""
    logits = self.student(x).logits
    entropy = F.cross_entropy(logits, labels)
    kl = _divergence(logits, teacher_logits)
    return {'cross_entropy': entropy, 'distillation': kl, 'loss': entropy + kl}

  def move_centroids(self, labels, raw, share):
    """Moves the centroids of the classes that the teacher recognised."""
    rows = labels[share > 0]  # equal where of one class
    weight = torch.where(self.seen[rows], BETA, 1.0)[:, None]
    for old, new in zip(self.centroids, raw, strict=True):
      old[:, rows] = old[:, rows].lerp(new[:, share > 0], weight)
    self.seen[rows] = True


def statistic(mean, var):
  return torch.stack([mean, (var + EPSILON).sqrt()])


def generate(p, z, labels, layout):
  """Runs the generator with parameters p."""

  def batch_norm(x, name):
    gain, bias = p.get(f'{name}/scale'), p.get(f'{name}/bias')
    return F.batch_norm(x, None, None, gain, bias, training=True)

  z = z * F.embedding(labels, p['embedding/embedding'])
  x = F.linear(z, p['dense/kernel'], p['dense/bias']).reshape(len(z), -1, 8, 8)
  x = batch_norm(x.contiguous(memory_format=layout), 'bn0')
  for i in (1, 2):
    x = F.interpolate(x, scale_factor=2)
    x = batch_norm(F.conv2d(x, p[f'conv{i}/kernel'], padding=1), f'bn{i}')
    x = F.leaky_relu(x, 0.2, inplace=True)
  x = F.conv2d(x, p['conv_out/kernel'], p['bias_out'], padding=1)
  return batch_norm(torch.tanh(x), 'bn_out')


def augment(x):
  """Makes random resized crops (area 0.8-1, aspect 3/4-4/3) and flips."""
  area = torch.empty(len(x)).uniform_(0.8, 1.0)
  aspect = torch.empty(len(x)).uniform_(-0.2877, 0.2877).exp()
  size = torch.stack([area * aspect, area / aspect], 1).sqrt().clamp(max=1)
  theta = torch.zeros(len(x), 2, 3)
  theta[:, :, 2] = (2 * torch.rand_like(size) - 1) * (1 - size)
  theta[:, 0, 0] = size[:, 0] * (1 - 2 * torch.randint(2, (len(x),)))
  theta[:, 1, 1] = size[:, 1]
  grid = F.affine_grid(theta, x.shape, align_corners=False)
  return F.grid_sample(x, grid, padding_mode='border', align_corners=False)


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
