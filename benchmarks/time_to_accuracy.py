"""Seconds until a student loses no more than published ones do.

    python -m benchmarks.time_to_accuracy [--seeds 0 1 2]

Methods: our recipe, the same without class terms, and students that are not
trained. All run in one process. The script evaluates a student on real images
every `--every` of its steps. Seconds are those of steps and transitions,
without compilation and evaluation. Untrained students see procedural images
alone, so their seconds do not contain the generator. The first evaluation below
a target decides; the drop at the end stands beside it. `--steps 2 2 4` tries
the script.
"""

import argparse
import functools
import os
import runpy
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import accuracy, records
from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.method import losses, procedural
from clusterq_jax.modes import train
from clusterq_jax.quant import numerics, quantizers
from clusterq_jax.runtime import evaluation
from clusterq_jax.runtime import session as experiment

# Published drops at W4A4, in points, by config and method. SynQ's are the best
# with uniform bits and one scale per tensor of activations.
PUBLISHED: dict[str, dict[str, float]] = {}
for _record in records.read('published', group='drop', bits='W4A4'):
  PUBLISHED.setdefault(_record['config'], {})[_record['method']] = _record[
    'drop'
  ]
OURS, PLAIN = 'ours', 'ours without class terms'
NO_CLASS_TERMS = {'loss.sfda': 0.0, 'loss.diversity': 0.0}


class Point(NamedTuple):
  """A student on real images, on the course of its method.

  seconds: so far; drop: in percentage points; divergence: mean KL from the
  teacher, nats.
  """

  seconds: float
  drop: float
  divergence: float


Course = list[Point]


class Clock:
  """Seconds inside `with` blocks, without those of a compiler."""

  def __init__(self, compiler: train.Compiler):
    self.seconds, self._compiler = 0.0, compiler

  def __enter__(self):
    self._start = time.monotonic() - self._compiler.seconds

  def __exit__(self, *_):
    self.seconds += time.monotonic() - self._compiler.seconds - self._start


class Bench:
  """A run of a config without joint steps, step by step, and evaluations."""

  def __init__(self, config, images):
    self.config, self.images = config, images
    self.teacher = experiment.load_teacher(config)
    self.steps = experiment.make_steps(config, self.teacher)
    self.compile = train.Compiler(self.steps.mesh)
    self.clock = Clock(self.compile)
    everywhere = sharding.replicated(self.steps.mesh)
    root = jax.random.key(config.seed)
    # The streams of `train.quantize`: this is the run that it would be.
    self.keys = jax.device_put(
      [jax.random.fold_in(root, i) for i in range(4)], everywhere
    )
    self.variables = jax.device_put(self.teacher.variables, everywhere)
    init = jax.jit(self.steps.init, out_shardings=everywhere)
    self.state = init(self.keys[0], self.variables)
    self._logits = jax.jit(self._network)

  def _network(self, student, variables, pixels):
    x = self.teacher.preprocessing.normalize(pixels)
    if student is None:
      return self.steps.teacher_logits(variables, x)
    return self.steps.student_logits(student, variables, x)

  def logits(self, student) -> np.ndarray:
    """On all images; the teacher's, if student is None."""
    images, size = self.images.images, self.config.eval.batch_size
    batches = [images[i : i + size] for i in range(0, len(images), size)]
    found = [self._logits(student, self.variables, b) for b in batches]
    return np.concatenate(jax.device_get(found))

  @functools.cached_property
  def teacher_logits(self) -> np.ndarray:
    return self.logits(None)

  def point(self, student, seconds: float | None = None) -> Point:
    """Where a student is, by default now."""
    seconds = self.clock.seconds if seconds is None else seconds
    both = self.logits(student), self.teacher_logits
    own, teacher = (
      evaluation.percent(x.argmax(-1) == self.images.labels) for x in both
    )
    divergence = float(losses.distillation_loss(*both))
    return Point(seconds, teacher - own, divergence)

  def _transition(self, function, key):
    args = self.state, self.variables, key
    program = self.compile(function, *args, donate=True)
    with self.clock:
      self.state = jax.block_until_ready(program(*args))

  def train(self, function, count: int, every: int) -> Iterator[None]:
    """Yields after every so many steps, with the clock stopped."""
    args = self.variables, self.keys[1]
    program = self.compile(function, self.state, *args, donate=True)
    for start in range(0, count, every):
      with self.clock:
        for _ in range(min(every, count - start)):
          self.state, _ = program(self.state, *args)
        jax.block_until_ready(self.state)
      yield

  def run(self, function, count: int) -> None:
    list(self.train(function, count, count or 1))

  def warm_up(self) -> None:
    self.run(self.steps.warmup_step, self.config.schedule.warmup_steps)

  def train_generator(self) -> None:
    steps = self.steps
    images = self.config.centroids.images_per_class * steps.num_classes
    keys = jax.random.split(self.keys[2], -(-images // steps.batch_size))
    self._transition(steps.initialize_centroids, keys)
    self.run(steps.generator_step, self.config.schedule.generator_steps)

  def make_procedural(self) -> None:
    batches = self.config.schedule.procedural_batches
    self.run(self.steps.procedural_step, batches * procedural.STEPS)

  def calibrate(self) -> None:
    self._transition(self.steps.calibrate_student, self.keys[3])

  def prepare(self) -> dict[str, float]:
    """From nothing to the first student step; seconds of each phase."""
    spent = {}
    for phase in (
      self.warm_up,
      self.train_generator,
      self.make_procedural,
      self.calibrate,
    ):
      before = self.clock.seconds
      phase()
      spent[phase.__name__] = self.clock.seconds - before
    return spent

  def delivered(self):
    """The student with the headroom that a run ends with."""
    student, steps = self.state.student, self.steps
    quant = quantizers.widen(
      steps.plan,
      student['quant'],
      steps.graph.last_stage,
      self.config.quant.headroom,
    )
    return {**student, 'quant': quant}

  def train_student(self, every: int) -> Course:
    course = [self.point(self.delivered())]
    count = self.config.schedule.student_steps
    for _ in self.train(self.steps.student_step, count, every):
      course.append(self.point(self.delivered()))
    return course


def flip(errors: np.ndarray, codes: np.ndarray, count: int, high: int) -> None:
  """Moves codes to their other neighbour until the errors add up to about 0.

  Args:
    errors: exact codes minus `codes`, [N]; changed in place.
    codes: integers, [N]; changed in place.
    count: of codes to move up, or, if negative, down.
    high: no magnitude beyond it.
  """
  sign = np.sign(count)
  free = (errors * sign > 0) & (np.abs(codes + sign) <= high)
  chosen = np.argsort(np.where(free, -errors * sign, 1.0))[: abs(count)]
  chosen = chosen[free[chosen]]
  codes[chosen] += sign
  errors[chosen] -= sign


def squant(kernel: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
  """Rounds a kernel so that errors cancel within a window and a channel.

  After SQuant (Guo et al. 2022, arXiv 2202.07471): closed form, no data. Its
  restriction of the channel's flips to one per window is left out.

  Args:
    kernel: [H, W, C, O] or [C, O].
    step: [O].
    bits: of weights.
  """
  _, high = numerics.weight_range(bits)
  exact = np.clip(kernel / step, -high, high)
  exact = exact.reshape(-1, *kernel.shape[-2:])  # [window, C, O]
  codes = np.round(exact)
  errors = exact - codes
  for o in range(kernel.shape[-1]):
    for c in range(kernel.shape[-2]) if len(exact) > 1 else ():
      e, q = errors[:, c, o].copy(), codes[:, c, o].copy()
      flip(e, q, int(np.round(e.sum())), high)
      errors[:, c, o], codes[:, c, o] = e, q
    e, q = errors[:, :, o].ravel(), codes[:, :, o].ravel()
    flip(e, q, int(np.round(e.sum())), high)
    codes[:, :, o] = q.reshape(codes.shape[:2])
  return (codes.reshape(kernel.shape) * step).astype(np.float32)


def calibrated(
  bench: Bench, minmax, spent: dict[str, float]
) -> dict[str, Course]:
  """Students that saw the calibration images, and were not trained.

  These images are procedural ones: no generator is needed.

  Args:
    bench: with a calibrated student.
    minmax: its config, with ranges by largest magnitude.
    spent: seconds, of `bench.prepare`.
  """
  courses = {}
  student, made = bench.state.student, spent['make_procedural']
  seconds = made + spent['calibrate']
  courses['calibration alone'] = [bench.point(student, seconds)]

  # Rounded on their own, the teacher's weights leave its BatchNorms alone.
  params = {
    k: dict(v) for k, v in jax.device_get(bench.variables['params']).items()
  }
  student = {**student, 'params': params}
  courses['MSE ranges, nearest rounding'] = [bench.point(student, seconds)]

  start = time.monotonic()
  plan = bench.steps.plan
  for name, bits in plan.weights:
    kernel = params[name]['kernel']
    grid = quantizers.weight_grid(plan, name, kernel, student['quant'][name])
    params[name]['kernel'] = squant(kernel, np.asarray(grid.step), bits)
  seconds += time.monotonic() - start
  courses['MSE ranges, closed-form rounding'] = [bench.point(student, seconds)]

  other = Bench(minmax, bench.images)
  other.state = other.state.replace(
    generator=bench.state.generator, pool=bench.state.pool
  )
  args = other.state, other.variables, other.keys[3]
  program = other.compile(other.steps.calibrate_student, *args)
  with other.clock:
    state = jax.block_until_ready(program(*args))
  seconds = made + other.clock.seconds
  courses['min-max ranges'] = [other.point(state.student, seconds)]
  return courses


def read_config(name: str, seed: int, fields: dict[str, Any]):
  path = accuracy.ROOT / 'configs' / f'{name}.py'
  config = runpy.run_path(str(path))['get_config']()
  given = {k: str(v) for k, v in accuracy.inputs(name)[1].items()}
  config.update_from_flattened_dict({**given, 'seed': seed, **fields})
  config_lib.validate(config)
  return config


def measure(
  name: str, seed: int, every: int, fields: dict[str, Any]
) -> dict[str, Course]:
  """The course of every method with one seed; fields: of the config."""
  ours = read_config(name, seed, fields)
  plain = read_config(name, seed, fields | NO_CLASS_TERMS)
  minmax = read_config(name, seed, fields | {'quant.ranges': 'minmax'})
  images = experiment.load_images(ours, experiment.load_teacher(ours))
  courses: dict[str, Course] = {}
  for method, config in ((OURS, ours), (PLAIN, plain)):
    bench = Bench(config, images)
    spent = bench.prepare()
    new = calibrated(bench, minmax, spent) if method == OURS else {}
    new[method] = bench.train_student(every)
    print(f'seed {seed}, compiled in {bench.compile.seconds:.0f} s', flush=True)
    for label, course in new.items():
      points = ', '.join(f'{p.seconds:.0f} s {p.drop:.2f}' for p in course)
      print(f'  {label}: {points}', flush=True)
    courses |= new
  return courses


def reached(courses: list[Course], target: float) -> list[float]:
  """Seconds of the first point no worse than the target, where there is one."""
  firsts = [
    next((p.seconds for p in c if p.drop <= target), None) for c in courses
  ]
  return [t for t in firsts if t is not None]


def time_to(target: float, courses: list[Course], ours: list[Course]) -> str:
  """Mean over the seeds; its ratio to that of ours, where all get there."""
  found, others = reached(courses, target), reached(ours, target)
  if not found:
    return 'never'
  cell = f'{statistics.mean(found):.0f} s'
  if len(found) < len(courses):
    return f'{cell} ({len(found)} of {len(courses)} seeds)'
  if len(others) < len(ours):
    return cell
  return f'{cell} (x{statistics.mean(found) / statistics.mean(others):.2f})'


def table(
  runs: list[dict[str, Course]], targets: dict[str, float]
) -> Iterator[str]:
  """Lines of a Markdown table; figures are means over the seeds."""
  headers = [f"to {name}'s {drop:.2f}" for name, drop in targets.items()]
  yield f'| method | {" | ".join(headers)} | end | drop there | KL there |'
  yield '|---' * (len(headers) + 4) + '|'
  ours = [run[OURS] for run in runs]
  for method in (OURS, *(m for m in runs[0] if m != OURS)):
    courses = [run[method] for run in runs]
    cells = [time_to(drop, courses, ours) for drop in targets.values()]
    last = [c[-1] for c in courses]
    end = statistics.mean(p.seconds for p in last)
    kl = statistics.mean(p.divergence for p in last)
    drops = accuracy.spread([p.drop for p in last])
    yield (
      f'| {method} | {" | ".join(cells)} | {end:.0f} s | {drops} | {kl:.4f} |'
    )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--config', choices=PUBLISHED, default='cifar10_resnet20_fast')
  add('--seeds', type=int, nargs='+', default=[0, 1, 2])
  add('--every', type=int, default=25, help='student steps per evaluation')
  add('--steps', type=int, nargs=3, help='warm-up, generator, student: a trial')
  args = parser.parse_args()
  overrides = {}
  if args.steps:
    names = ('warmup_steps', 'generator_steps', 'student_steps', 'pool_batches')
    counts = (*args.steps, args.steps[1])
    fields = (f'schedule.{name}' for name in names)
    overrides = dict(zip(fields, counts, strict=True))
    overrides['schedule.procedural_batches'] = 1
  machine = accuracy.machine()
  print(
    f'{args.config}, W4A4, seeds {args.seeds}, {accuracy.code()}, '
    f'{machine["cores"]} cores, {machine["cpu"]}, '
    f'load average {os.getloadavg()[0]:.2f} at start'
  )
  runs = [measure(args.config, s, args.every, overrides) for s in args.seeds]
  print('\n'.join(table(runs, PUBLISHED[args.config])))
  print(f'load average {os.getloadavg()[0]:.2f} at the end')
  return 0


if __name__ == '__main__':
  sys.exit(main())
