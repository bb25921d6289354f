"""Seconds per joint step: this project's `Steps.joint_step` and plain PyTorch.

    python -m benchmarks.step_time [--generator=slim|full|both] [--check]

`clusterq_jax/method/steps.py` says what a step does; the second half of this
file says it again in eager PyTorch. Weights and centroids are random: the time
does not depend on them. Both sides augment every batch.

Each framework runs in processes of its own, in turns. A process discards two
steps and times `--steps`; there are `--rounds` per framework. The script
prints medians with ranges, and the ratios of the rounds' medians. No step time
contains the compilation. Beside other work torch loses more time than JAX.

`--check` runs one step of both from the same parameters, noise and labels, in
float64, and compares losses, centroids and gradients. It ends with exit code 1
where they differ. Give it a batch of 24 images or more: the class terms need an
image that the teacher gets right.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata, util
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Children of both frameworks run in the environment of launch/setup.sh.
LAUNCH_ENVIRONMENT = 'source launch/setup.sh; clusterq_env; exec "$@"'
CHANNELS = {'slim': (128, 64, 32), 'full': (128, 128, 64)}
CLASSES, LATENT, WARM_UP = 10, 100, 2
TOLERANCE = 1e-3  # of --check, relative


# ------------------------------------------------------------------------ JAX
def make_steps(args):
  from clusterq_jax import config as config_lib
  from clusterq_jax.models import registry
  from clusterq_jax.models.graph import trace
  from clusterq_jax.models.preprocessing import Preprocessing
  from clusterq_jax.runtime import session as experiment
  from clusterq_jax.weights import teacher

  config = config_lib.defaults()
  config.schedule.batch_size = args.batch_size
  config.generator.channels = CHANNELS[args.generator]
  config.quant.ranges, config.student.optimizer = 'learned', 'adam'
  config.augment.probability = 0.0 if args.check else 1.0
  config.loss.noise = (0.0, 0.0) if args.check else NOISE
  build = registry.builder('resnet20', num_classes=CLASSES)
  prep = Preprocessing((32, 32), (0.5,) * 3, (0.25,) * 3)
  graph = trace(build)
  return experiment.make_steps(
    config, teacher.Teacher(build, graph, {}, prep, CLASSES, {}, (), '')
  )


def make_inputs(steps, seed: int):
  """A teacher's variables and the train state, none of it at its default."""
  import jax

  from clusterq_jax.layers import float_layers

  rng, key = np.random.RandomState(seed), jax.random.key(seed)

  def weights(path, s):
    kernel = len(s.shape) > 1
    width = math.sqrt(3 / math.prod(s.shape[:-1])) if kernel else 0.3
    ranges = {'scale': (0.4, 0.8), 'var': (0.5, 1.5)}
    low, high = ranges.get(path[-1].key, (-width, width))
    return rng.uniform(low, high, s.shape).astype(s.dtype)

  def log_step(path, s):
    step = {'weights': 0.02, 'output': 0.2}[path[-1].key]
    return np.full(s.shape, math.log(step), s.dtype)

  network = steps.build(float_layers.layer_set())
  image = np.zeros((1, *steps.generator.shape))
  with_path = jax.tree_util.tree_map_with_path
  teacher = with_path(weights, jax.eval_shape(network.init, key, image))
  state = jax.jit(steps.init)(key, teacher)
  quant = with_path(log_step, state.student['quant'])
  centroids = jax.tree.map(
    lambda a: rng.uniform(0.2, 1.2, a.shape).astype(a.dtype), state.centroids
  ).replace(seen=np.ones(CLASSES, bool))
  student = {**state.student, 'quant': quant}
  return teacher, state.replace(student=student, centroids=centroids)


def flatten(tree) -> dict[str, np.ndarray]:
  """Arrays by path."""
  from jax import tree_util

  return {
    tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in tree_util.tree_leaves_with_path(tree)
  }


class JaxStep:
  """`joint_step` as `train.quantize` runs it: compiled once, state donated."""

  def __init__(self, args):
    import jax

    from clusterq_jax import sharding
    from clusterq_jax.modes import train

    steps = make_steps(args)
    compiler = train.Compiler(steps.mesh)
    teacher, state = make_inputs(steps, args.seed)
    if args.check:  # Flax makes float32 parameters under x64, too
      teacher, state = jax.tree.map(
        lambda a: np.float64(a) if a.dtype == np.float32 else a,
        (teacher, state),
      )
    self.inputs = flatten({'teacher': teacher, 'state': state})
    self.state, *self.rest = jax.device_put(
      (state, teacher, jax.random.key(args.seed)),
      sharding.replicated(steps.mesh),
    )
    self.run = compiler(steps.joint_step, self.state, *self.rest, donate=True)
    self.block, self.compile_s = jax.block_until_ready, compiler.seconds

  def __call__(self):
    self.state, terms = self.block(self.run(self.state, *self.rest))
    return terms


# -------------------------------------------------------------------- PyTorch
# Parameters are dicts by their JAX names, in torch's layout. Statistics are
# tensors [2, ..., C]: mean, std; centroids [3, K, C]: averages over samples of
# mean, its square, variance. A process that times JAX never imports torch.
A1, A2, A3, BETA, NOISE = 0.1, 0.9, 0.6, 0.2, (0.5, 1.0)
EPSILON = 1e-6  # inside square roots
INPUT_LIMIT = 2.0  # largest magnitude of a pixel under mean 0.5, std 0.25
torch: Any = None
F: Any = None
fake_quant: Any = None


def import_torch(args) -> None:
  global torch, F, fake_quant
  import torch
  from torch.nn import functional as F

  torch.set_num_threads(args.threads)
  torch.set_default_dtype(torch.float64 if args.check else torch.float32)

  class FakeQuant(torch.autograd.Function):
    """step * clip(round(x / step)): straight-through; LSQ for the step."""

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
  """As `class_statistics.Classes`."""

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


# ------------------------------------------------------------------- children
def check(args) -> int:
  """One step of both from the same state; 1 where they differ.

  In float64: in float32 the last bit decides a few codes of the quantizers,
  and each of them the codes after it.
  """
  import jax

  ours = JaxStep(args)
  # What `joint_step` draws at step 0.
  key = jax.random.fold_in(jax.random.key(args.seed), 0)
  z_key, label_key = jax.random.split(jax.random.split(key, 3)[0])
  z = jax.random.normal(z_key, (args.batch_size, LATENT))
  labels = jax.random.randint(label_key, (args.batch_size,), 0, CLASSES)
  import_torch(args)
  fixed = torch.tensor(np.asarray(z)), torch.tensor(np.asarray(labels)).long()
  plain = TorchStep(args, ours.inputs, fixed)
  expected, found = ours(), plain()
  if not expected['generator/sfda']:
    print('no image is of its class to the teacher: try another --seed')
    return 1
  rows = [(k, expected[k], v) for k, v in found.items()]
  layers = zip(ours.state.centroids.layers, plain.centroids, strict=True)
  rows += [
    (f'centroids/{i}', np.stack(a), b) for i, (a, b) in enumerate(layers)
  ]
  mu = ours.state.generator_opt.mu, ours.state.student_opt.mu
  for name, mean, decay, trained in (
    ('generator', mu[0], 0.5, plain.generator),
    ('student', mu[1]['params'], 0.9, plain.params),
    ('quantizer', mu[1]['quant'], 0.9, plain.quant),
  ):
    # Adam's first moment after one step is the gradient times 1 - decay.
    a = {k: from_jax(f'/{k}', v) for k, v in flatten(mean).items()}
    b = np.concatenate([trained[k].grad.numpy().ravel() for k in a])
    a = np.concatenate([v.ravel() for v in a.values()]) / (1 - decay)
    rows.append((f'gradient/{name}', a, b))
  worst = 0.0
  for name, *values in rows:
    a, b = (np.asarray(v, np.float64) for v in values)
    error = np.linalg.norm(a - b) / np.linalg.norm(a)
    worst = np.maximum(worst, error)
    sizes = f'jax {np.linalg.norm(a):.6g}, torch {np.linalg.norm(b):.6g}'
    print(f'{name:22s} {sizes}, relative {error:.1e}')
  same = bool(worst <= TOLERANCE)
  print(args.generator, 'is the same work' if same else 'DIFFERS')
  return int(not same)


def child(args) -> int:
  """Times one framework; prints JSON."""
  if args.child == 'jax':
    step = JaxStep(args)
    np.savez(args.inputs, **step.inputs)
  else:
    import_torch(args)
    step = TorchStep(args, dict(np.load(args.inputs)))
  seconds = []
  for _ in range(WARM_UP + args.steps):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
  malloc = [f'{k}={v}' for k, v in os.environ.items() if 'MALLOC' in k]
  malloc.append(f'GLIBC_TUNABLES={os.environ.get("GLIBC_TUNABLES", "")}')
  compile_s = getattr(step, 'compile_s', 0.0)
  print(json.dumps([seconds[WARM_UP:], compile_s, ' '.join(malloc)]))
  return 0


# --------------------------------------------------------------------- parent
def call(kind: str, generator: str, inputs: str = '', **kwargs):
  child = ['-m', 'benchmarks.step_time', *sys.argv[1:], f'--child={kind}']
  child += [f'--generator={generator}', f'--inputs={inputs}']
  bash = ['bash', '-c', LAUNCH_ENVIRONMENT, 'bash', sys.executable]
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run([*bash, *child], cwd=ROOT, env=env, **kwargs)


def spread(values: list[float]) -> str:
  middle = statistics.median(values)
  return f'{middle:.3f} ({min(values):.3f}-{max(values):.3f})'


def machine(args) -> str:
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  models = [x.split(': ')[1] for x in lines if x.startswith('model name')]
  versions = [f'{n} {metadata.version(n)}' for n in ('jax', 'jaxlib', 'torch')]
  return (
    f'{args.threads} threads on {os.cpu_count()} cores, '
    f'{(models or [platform.machine()])[0]}, load average '
    f'{os.getloadavg()[0]:.2f} at start, Python {platform.python_version()}, '
    f'{", ".join(versions)}, batch {args.batch_size}'
  )


def measure(args, generator: str) -> None:
  times: dict[str, list] = {'jax': [], 'torch': []}
  compiled = []
  with tempfile.TemporaryDirectory() as folder:
    for i in range(args.rounds):
      for kind, rounds in times.items():
        inputs = f'{folder}/inputs.npz'
        done = call(kind, generator, inputs, stdout=subprocess.PIPE)
        if done.returncode:
          sys.exit(f'error: the {kind} process ended with {done.returncode}')
        seconds, compile_s, malloc = json.loads(done.stdout.splitlines()[-1])
        rounds.append(seconds)
        compiled += [compile_s] * (kind == 'jax')
        print(f'  {generator} round {i + 1} {kind}: {spread(seconds)}')
  medians = [[statistics.median(s) for s in r] for r in times.values()]
  ratios = [a / b for a, b in zip(*medians, strict=True)]
  for kind, rounds in times.items():
    print(f'{generator}: {kind} {spread(sum(rounds, []))} s/step')
  print(f'{generator}: jax/torch {spread(ratios)}, medians of rounds')
  print(f'{generator}: jax compiles in {spread(compiled)} s; {malloc}')


def main() -> int:
  cores = sorted(os.sched_getaffinity(0))
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--generator', default='both', choices=[*CHANNELS, 'both'])
  add('--batch_size', type=int, default=128)
  add('--steps', type=int, default=10, help='timed ones, per round')
  add('--rounds', type=int, default=3, help='processes per framework')
  add('--threads', type=int, default=len(cores))
  add('--seed', type=int, default=0)
  add('--check', action='store_true', help='compare results, time nothing')
  add('--child', help=argparse.SUPPRESS)
  add('--inputs', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    os.sched_setaffinity(0, cores[: args.threads])  # for XLA
    if args.check:
      os.environ['JAX_ENABLE_X64'] = '1'
      return check(args)
    return child(args)
  if util.find_spec('torch') is None:
    print('error: PyTorch is missing: pip install torch', file=sys.stderr)
    return 2
  names = CHANNELS if args.generator == 'both' else [args.generator]
  if args.check:
    return max(call('check', name).returncode for name in names)
  print(machine(args))
  if os.getloadavg()[0] > 0.5:
    print('warning: the machine is busy; the ratio is not to be trusted')
  for name in names:
    measure(args, name)
  return 0


if __name__ == '__main__':
  sys.stdout.reconfigure(line_buffering=True)
  sys.exit(main())
