"""Measures how long a student takes to lose no more than published ones do.

    python -m benchmarks.time_to_accuracy [--seeds 0 1 2]

It compares the recipe, the recipe without class terms, and students that are
not trained. All run in one process. Every `--every` steps the script evaluates
the student on real images. Seconds are those of steps and transitions, without
compilation and evaluation. Untrained students see only procedural images, so
their seconds do not contain the generator. The first evaluation at or below a
target decides.

A line for each method and seed goes to records/time_to_accuracy.jsonl beside
this file. `--budget=0.004` tries the script and records nothing.
"""

import argparse
import contextlib
import functools
import runpy
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accuracy, common, records, rounding
from clusterq_jax import config as config_lib
from clusterq_jax import data
from clusterq_jax.config import Config
from clusterq_jax.method import losses
from clusterq_jax.method.phases import Phase
from clusterq_jax.quant import quantizers
from clusterq_jax.runtime import evaluation
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime.session import Session

RECORDS = records.FOLDER / 'time_to_accuracy.jsonl'
TRAINED = {
  'recipe': {},
  'recipe without class terms': {'loss.sfda': 0.0, 'loss.diversity': 0.0},
}


class Point(NamedTuple):
  """A student on real images.

  Attributes:
    seconds: from the start of the run to this student.
    drop: of top-1 accuracy, in percentage points.
    divergence: mean KL from the teacher, in nats.
  """

  seconds: float
  drop: float
  divergence: float


class Bench:
  """A session whose steps are timed and whose students are evaluated.

  Attributes:
    session: the run.
    images: real ones.
    state: the present train state.
    seconds: spent in steps and transitions, without compilation.
  """

  def __init__(self, config: Config, images: data.Images):
    self.session, self.images = Session(config), images
    self.state = self.session.init()
    self.seconds = 0.0
    self._logits = jax.jit(self._network)

  def _network(self, student, pixels):
    networks, teacher = self.session.steps.networks, self.session.variables
    x = networks.preprocessing.normalize(pixels)
    if student is None:
      return networks.teacher_logits(teacher, x)
    return networks.student_logits(student, teacher, x)

  def logits(self, student: Any) -> np.ndarray:
    """Returns a student's logits on all images; None: the teacher's."""
    images, size = self.images.images, self.session.config.eval.batch_size
    batches = [images[i : i + size] for i in range(0, len(images), size)]
    return np.concatenate([self._logits(student, b) for b in batches])

  @functools.cached_property
  def teacher_logits(self) -> np.ndarray:
    return self.logits(None)

  def point(self, student: Any = None, seconds: float | None = None) -> Point:
    """Evaluates a student; by default the present one, as it is delivered."""
    if student is None:
      student = self.session.deliver(self.state).student
    both = self.logits(student), self.teacher_logits
    own, teacher = (
      evaluation.percent(x.argmax(-1) == self.images.labels) for x in both
    )
    divergence = float(losses.distillation_loss(*both))
    seconds = self.seconds if seconds is None else seconds
    return Point(seconds, teacher - own, divergence)

  @contextlib.contextmanager
  def clock(self) -> Iterator[None]:
    """Adds the seconds of a block, without those of the compiler."""
    start = time.monotonic() - self.session.compile.seconds
    yield
    jax.block_until_ready(self.state)
    self.seconds += time.monotonic() - self.session.compile.seconds - start

  def enter(self, phase: Phase) -> None:
    with self.clock():
      self.state = self.session.enter(phase, self.state)

  def steps(self, phase: Phase, every: int) -> Iterator[None]:
    """Yields after every so many steps, with the clock stopped."""
    program = self.session.program(phase)
    for start in range(0, phase.length, every):
      with self.clock():
        for _ in range(min(every, phase.length - start)):
          self.state, _ = program(self.state, *self.session.step_arguments)
      yield

  def run(self, phase: Phase) -> None:
    """Runs a whole phase."""
    self.enter(phase)
    list(self.steps(phase, phase.length))

  def train_student(self, every: int) -> list[Point]:
    """Runs the last phase; returns the student's course, from its start."""
    course = [self.point()]
    for _ in self.steps(self.session.phases[-1], every):
      course.append(self.point())
    return course


def untrained(
  bench: Bench, minmax: Config, procedural: float, calibration: float
) -> dict[str, list[Point]]:
  """Evaluates students that saw the calibration images and were not trained.

  Args:
    bench: with a calibrated student.
    minmax: its config, with ranges by largest magnitude.
    procedural: seconds that the procedural images took.
    calibration: seconds that the calibration took.

  Returns:
    Courses of one point, by method.
  """
  student = bench.state.student
  seconds = procedural + calibration
  found = {'calibration of the recipe': [bench.point(student, seconds)]}

  # These two leave the teacher's BatchNorms as they are.
  params = jax.device_get(bench.session.variables['params'])
  params = {name: dict(own) for name, own in params.items()}
  student = {**student, 'params': params}
  point = bench.point(student, seconds)
  found['ranges by squared error, nearest rounding'] = [point]

  start = time.monotonic()
  plan = bench.session.steps.networks.plan
  for name, bits in plan.weights:
    kernel = params[name]['kernel']
    grid = quantizers.weight_grid(plan, name, kernel, student['quant'][name])
    step = np.asarray(grid.step)
    params[name]['kernel'] = rounding.squant(kernel, step, bits)
  point = bench.point(student, seconds + time.monotonic() - start)
  found['ranges by squared error, closed-form rounding (SQuant)'] = [point]

  other = Bench(minmax, bench.images)
  # A copy: the calibration donates its state.
  other.state = other.state.replace(pool=jnp.copy(bench.state.pool))
  other.enter(other.session.phases[-1])  # calibrates
  point = other.point(other.state.student, procedural + other.seconds)
  return found | {'ranges by largest magnitude': [point]}


def read_config(name: str, seed: int, fields: dict[str, Any]) -> Config:
  """Resolves a config of configs/ on the data of the tests."""
  path = common.ROOT / 'configs' / f'{name}.py'
  config = runpy.run_path(str(path))['get_config']()
  given = accuracy.inputs(name)[1] | {'seed': seed}
  # As in the records, and for comparison with published drops.
  given |= {'quant.placement': 'paper', **fields}
  config.update_from_flattened_dict(given)
  return config_lib.resolve(config)


def measure(
  name: str, seed: int, every: int, fields: dict[str, Any]
) -> tuple[dict[str, list[Point]], int]:
  """Runs every method with one seed.

  Args:
    name: of the config.
    seed: of the runs.
    every: student steps between evaluations.
    fields: of the config, and their values.

  Returns:
    The course of each method, and the number of images.
  """
  minmax = read_config(name, seed, fields | {'quant.ranges': 'minmax'})
  images = session_lib.load_images(minmax, session_lib.load_teacher(minmax))
  courses: dict[str, list[Point]] = {}
  for method, variant in TRAINED.items():
    bench = Bench(read_config(name, seed, fields | variant), images)
    *before, last = bench.session.phases
    for phase in before:
      start = bench.seconds
      bench.run(phase)
    procedural, calibrated = bench.seconds - start, bench.seconds
    bench.enter(last)
    if not variant:
      calibration = bench.seconds - calibrated
      courses |= untrained(bench, minmax, procedural, calibration)
    courses[method] = bench.train_student(every)
  return courses, len(images.labels)


def targets(config: str) -> dict[str, float]:
  """Returns the published drops at W4A4, in points, by method."""
  found = records.read('published', group='drop', config=config, bits='W4A4')
  return {record['method']: record['drop'] for record in found}


def record(
  config: str, seed: int, method: str, course: list[Point], images: int
) -> records.Record:
  """Makes the record of a method's course."""
  last = course[-1]
  reached = {
    name: next((round(p.seconds) for p in course if p.drop <= drop), None)
    for name, drop in targets(config).items()
  }
  return {
    'config': config,
    'bits': 'W4A4',
    'seed': seed,
    'method': method,
    'trained': method in TRAINED,
    'reached_s': reached,
    'end_s': round(last.seconds),
    'drop': round(last.drop, 2),
    'divergence': round(last.divergence, 4),
    'images': images,
    **common.provenance(),
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--config', default='cifar10_resnet20_fast')
  add('--seeds', type=int, nargs='+', default=[0, 1, 2])
  add('--every', type=int, default=25, help='student steps per evaluation')
  add('--budget', type=float, default=1.0, help='below 1: a trial')
  args = parser.parse_args()
  targets(args.config)  # fails early where nothing is published
  for seed in args.seeds:
    courses, images = measure(
      args.config, seed, args.every, {'budget': args.budget}
    )
    for method, course in courses.items():
      points = ', '.join(f'{p.seconds:.0f} s {p.drop:.2f}' for p in course)
      print(f'seed {seed}, {method}: {points}', flush=True)
      if args.budget == 1:
        new = record(args.config, seed, method, course, images)
        records.append(RECORDS, new)
  return 0


if __name__ == '__main__':
  sys.exit(main())
