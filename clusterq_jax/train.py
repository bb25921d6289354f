"""A run from config to results: the loop, in the order of the data's path.

No formulas here: they are in `steps.py` and what it calls.
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from clusterq_jax import (
  augment,
  bucket,
  checkpoint,
  data,
  evaluation,
  experiment,
  forecast,
  losses,
  precision,
  preemption,
  reuse,
  samples,
  sharding,
)
from clusterq_jax import config as config_lib
from clusterq_jax import metrics as metrics_lib
from clusterq_jax import student as student_lib
from clusterq_jax import workdir as workdir_lib
from clusterq_jax.errors import InputError
from clusterq_jax.layers import convolution, fake_quant, integer
from clusterq_jax.layers import float as float_layers
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.state import TrainState
from clusterq_jax.steps import Steps
from clusterq_jax.teacher import Teacher

# Streams of random numbers of a run, folded into its seed.
_INIT, _TRAIN, _CENTROIDS, _CALIBRATION, _HELD_OUT, _SAMPLES = range(6)
# Steps of a process that are not profiled: the first ones wait for allocations.
_BEFORE_TRACE = 3


class Compiler:
  """Compiles each program once, ahead of time, and counts the seconds.

  A program compiled ahead of time cannot compile again behind our back: other
  shapes are an error. What a program returns is on every device, as what it
  takes is.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self.seconds = 0.0
    self._everywhere = sharding.replicated(mesh)

  def __call__(self, function: Callable, *args, donate: bool = False):
    start = time.monotonic()
    jitted = jax.jit(
      function,
      donate_argnums=(0,) if donate else (),
      out_shardings=self._everywhere,
      compiler_options=convolution.compiler_options(),
    )
    name = getattr(function, '__name__', 'a program').replace('_', ' ')
    with metrics_lib.Waiting(f'compiling {name}'):
      compiled = jitted.lower(*args).compile()
    self.seconds += time.monotonic() - start
    return compiled


@dataclasses.dataclass(frozen=True)
class _Run:
  """What the parts of a run share.

  Attributes:
    config: the configuration.
    teacher: as loaded.
    variables: the teacher's, on the devices.
    steps: the steps of the method.
    keys: one per stream of random numbers.
    compile: the compiler.
  """

  config: ml_collections.ConfigDict
  teacher: Teacher
  variables: Any
  steps: Steps
  keys: list[jax.Array]
  compile: Compiler

  def initialize_centroids(self, state: TrainState) -> TrainState:
    images = self.config.centroids.images_per_class * self.steps.num_classes
    batches = -(-images // self.steps.batch_size)
    keys = jax.random.split(self.keys[_CENTROIDS], batches)
    args = (state, self.variables, keys)
    return self.compile(self.steps.initialize_centroids, *args, donate=True)(
      *args
    )

  def calibrate_student(self, state: TrainState) -> TrainState:
    args = (state, self.variables, self.keys[_CALIBRATION])
    return self.compile(self.steps.calibrate_student, *args, donate=True)(*args)

  def on_synthetic(self, state: TrainState) -> dict[str, Any]:
    """Student and teacher on images of the final generator, from unseen noise.

    As they are, the two hardly ever disagree on them: the student was trained
    on their like. Blended with one another they lie between classes, where real
    images lie too.
    """
    steps = self.steps

    def compare(state, variables, x):
      teacher = steps.teacher_logits(variables, x)
      student = steps.student_logits(state.student, variables, x)
      agree = jnp.argmax(student, -1) == jnp.argmax(teacher, -1)
      return agree, losses.distillation_loss(student, teacher)

    def answers(state, variables, key):
      image_key, mix_key = jax.random.split(key)
      images, _ = steps.generate(state.generator, image_key)
      x = steps.preprocessing.to_pixels(images)
      x = steps.preprocessing.normalize(x)
      blended = augment.mixup(mix_key, x, 1.0)
      return [compare(state, variables, images) for images in (x, blended)]

    key = self.keys[_HELD_OUT]
    batches = -(-self.config.eval.synthetic_images // steps.batch_size)
    program = self.compile(answers, state, self.variables, key)
    found = [
      program(state, self.variables, k) for k in jax.random.split(key, batches)
    ]
    found = jax.device_get(found)
    whole = np.concatenate([agree for (agree, _), _ in found])
    blended = np.concatenate([agree for _, (agree, _) in found])
    divergence = float(np.mean([divergence for _, (_, divergence) in found]))
    return {
      'agreement': evaluation.percent(whole),
      'blended_agreement': evaluation.percent(blended),
      'blended_divergence': round(divergence, 6),
      'n': len(whole),
    }

  def save_samples(self, state: TrainState, folder: pathlib.Path) -> None:
    classes = min(self.steps.num_classes, samples.ROWS)
    labels = np.repeat(np.arange(classes), samples.COLUMNS)
    everywhere = sharding.replicated(self.steps.mesh)
    x, _ = jax.jit(self.steps.generate, out_shardings=everywhere)(
      state.generator, self.keys[_SAMPLES], labels
    )
    if sharding.is_lead():
      pixels = np.asarray(
        self.teacher.preprocessing.to_pixels(jax.device_get(x))
      )
      shape = (classes, samples.COLUMNS, *pixels.shape[1:])
      samples.save(folder, pixels.reshape(shape), labels)

  def settle(self, state: TrainState) -> TrainState:
    """The student as it is delivered.

    It has the weights that its codes stand for, and ranges with headroom.
    """
    steps, headroom = self.steps, self.config.quant.headroom

    @jax.jit
    def deliver(student):
      params = fake_quant.settle(steps.plan, student)
      quant = fake_quant.widen(
        steps.plan, student['quant'], steps.graph.last_stage, headroom
      )
      return {**student, 'params': params, 'quant': quant}

    student = deliver(state.student)
    if self.config.quant.placement == 'integer':
      whole = {
        **jax.device_get(student),
        'batch_stats': self.teacher.variables['batch_stats'],
      }
      folded = integer.fold(steps.graph, steps.plan, whole, steps.preprocessing)
      student['params'] = jax.device_put(
        integer.round_biases(folded, whole), sharding.replicated(steps.mesh)
      )
    return state.replace(student=student)

  def save_student(self, state: TrainState, path: pathlib.Path) -> None:
    student_lib.save(
      path,
      {**state.student, 'batch_stats': self.variables['batch_stats']},
      self.config.teacher.arch,
      self.teacher.options,
      experiment.bits_of(self.config),
      self.steps.plan.learned,
      self.teacher.preprocessing,
      self.teacher.class_names,
    )


@precision.in_float32
@bucket.on_copy
def quantize(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Quantizes a teacher without data; resumes what the workdir holds.

  Args:
    config: see `config.defaults()`.
    workdir: folder of the run, made when missing; or gs://BUCKET/PATH.

  Returns:
    What results.json holds: accuracies and agreements in percent, `wall_s` and
    `compile_s` in seconds, `peak_rss_mb` in MB. Of several processes, all have
    to call this; only the first writes, evaluates and returns something.

  Raises:
    InputError: bad config, weights, images or workdir; or a loss that is no
      longer finite.
    Preempted: SIGTERM came; the state is saved.
  """
  began = time.monotonic()
  config_lib.validate(config)
  teacher = experiment.load_teacher(config)
  images = None
  if sharding.is_lead():
    images = experiment.load_images(config, teacher)
  steps = experiment.make_steps(config, teacher)
  with workdir_lib.open_workdir(config, workdir) as folder:
    return _quantize(config, teacher, images, steps, folder, began)


def _quantize(
  config: ml_collections.ConfigDict,
  teacher: Teacher,
  images: data.Images | None,
  steps: Steps,
  folder: pathlib.Path,
  began: float,
) -> dict[str, Any]:
  """The run itself; began: when, on the monotonic clock."""
  replicated = sharding.replicated(steps.mesh)

  def keys():
    root = jax.random.key(config.seed)
    return [jax.random.fold_in(root, i) for i in range(6)]

  run = _Run(
    config,
    teacher,
    variables=jax.device_put(teacher.variables, replicated),
    steps=steps,
    keys=jax.jit(keys, out_shardings=replicated)(),
    compile=Compiler(steps.mesh),
  )

  # ------------------------------------------------- state: resume or begin
  init = jax.jit(steps.init, out_shardings=replicated)
  init_args = run.keys[_INIT], run.variables
  checkpoints = checkpoint.Checkpoints(bucket.address(folder / 'checkpoints'))
  restored = checkpoints.restore(steps.abstract_state(*init_args), say=print)
  if restored is None:
    state, wall_before = init(*init_args), 0.0
    if config.generator.workdir:
      state = reuse.take_generator(config, teacher, run.keys[_INIT], state)
    bucket.upload(folder)
    checkpoints.save(int(state.step), state, 0.0)
  else:
    state, wall_before = restored

  # --------------------------------------------------------------- the loop
  def save(step: int, state: TrainState) -> None:
    # First: a run that resumes drops the losses of later steps, and needs those
    # of earlier ones.
    bucket.upload(folder)
    checkpoints.save(step, state, wall_before + time.monotonic() - began)

  state, images_per_s = _train(run, state, folder, save)

  # --------------------------------------------------- what came out of it
  state = run.settle(state)
  run.save_samples(state, folder)
  synthetic = run.on_synthetic(state)
  if not sharding.is_lead():
    return {}
  run.save_student(state, folder / student_lib.FILE)
  networks = {'student': student_lib.load(folder).logits}
  results: dict[str, Any] = _on_images(config, teacher, networks, images)
  bits = experiment.bits_of(config)
  params = run.variables['params']
  results |= {
    'synthetic': synthetic,
    'forecast': forecast.drop(synthetic['blended_divergence']),
    'bits': {
      **dataclasses.asdict(bits),
      'input': plan_lib.WIDE_BITS,
      'classifier_input': plan_lib.WIDE_BITS,
    },
    'size': {
      'teacher_bytes': sum(4 * a.size for a in jax.tree.leaves(params)),
      'student_bytes': int(plan_lib.weight_bytes(params, steps.plan)),
    },
    'steps': int(state.step),
    'seed': config.seed,
    'wall_s': round(wall_before + time.monotonic() - began, 2),
    'compile_s': round(run.compile.seconds, 2),
    'images_per_s': images_per_s,
    'peak_rss_mb': metrics_lib.peak_rss_mb(),
    'devices': [d.device_kind for d in jax.devices()],
  }
  return workdir_lib.merge_results(folder, results)


def _train(
  run: _Run,
  state: TrainState,
  folder: pathlib.Path,
  save: Callable[[int, TrainState], None],
) -> tuple[TrainState, float | None]:
  """Runs the steps that remain; returns the state and images per second.

  The loop never waits for the device but to save: metrics are fetched one
  logging interval late, when the device is long past them.

  Raises:
    Preempted: SIGTERM came; the state is saved.
  """
  s, steps = run.config.schedule, run.steps
  phases = config_lib.phases(s)
  total = sum(phases.values())
  centroids_at = s.warmup_steps
  calibrate_at = total - s.student_steps - s.joint_steps
  start = done = int(state.step)
  lead = sharding.is_lead()
  trace_steps = run.config.report.trace_steps if lead else 0
  traced = range(start + _BEFORE_TRACE, total)[:trace_steps]
  file = folder / 'metrics.jsonl' if lead else pathlib.Path(os.devnull)
  log = metrics_lib.MetricsFile(file, done)
  progress = metrics_lib.Progress(total, done, s.batch_size, silent=not lead)
  if done:
    progress.say(
      f'{bucket.address(folder)}: resuming at step {done} of {total}'
    )
  pending: list[tuple[int, str, Any]] = []

  def flush(keep: int) -> None:
    """Fetches logged metrics but the last `keep`: those may be running."""
    while len(pending) > keep:
      step, phase, (values, bad) = pending.pop(0)
      values, bad = jax.device_get((values, bad))
      if bad >= 0:
        progress.close()
        raise InputError(
          f'loss or weights are no longer finite since step {bad + 1}; the '
          f'last good one is kept in {folder / "checkpoints"}. Try a lower '
          'config.generator.lr or config.student.lr, in another workdir'
        )
      log.write(step, values)
      progress.update(step, phase, values)

  began, compiled_before = time.monotonic(), run.compile.seconds
  args = run.variables, run.keys[_TRAIN]
  end = 0
  with preemption.notice() as told_to_stop:
    for phase, length in phases.items():
      end += length
      if done >= end:
        continue
      program = run.compile(steps.of_phase[phase], state, *args, donate=True)
      while done < end:
        if done == centroids_at:
          state = run.initialize_centroids(state)
        if done == calibrate_at:
          state = run.calibrate_student(state)
        if traced and done == traced.start:
          jax.profiler.start_trace(str(folder / 'trace'))
        state, values = program(state, *args)
        done += 1
        if traced and done == traced.stop:
          jax.block_until_ready(values)
          jax.profiler.stop_trace()
        stop = told_to_stop(done) and done < total
        if done % run.config.report.log_every == 0 or done == total:
          # A copy: the state itself is donated to the next step.
          pending.append((done, phase, (values, jnp.copy(state.bad_step))))
          flush(keep=1)
        if stop or done % run.config.checkpoint_every == 0 or done == total:
          flush(keep=0)
          if int(state.bad_step) < 0:
            save(done, state)
        if stop:
          progress.close()
          raise preemption.Preempted(
            f'stopped by SIGTERM after step {done} of {total}, which is saved '
            f'in {folder}; the same command goes on from there'
          )
  flush(keep=0)
  progress.close()
  seconds = time.monotonic() - began - (run.compile.seconds - compiled_before)
  rate = (done - start) * s.batch_size / seconds
  return state, round(rate, 1) if done > start else None


def _on_images(
  config: ml_collections.ConfigDict,
  teacher: Teacher,
  others: Mapping[str, evaluation.Predict],
  images: data.Images | None,
) -> dict[str, Any]:
  """The evaluation's part of results.json.

  Args:
    others: as in `evaluation.on_images`, compiled.
  """
  network = teacher.build(float_layers.layer_set())

  @jax.jit
  def logits(variables, pixels):
    return network.apply(variables, teacher.preprocessing.normalize(pixels))

  networks: dict[str, evaluation.Predict] = {
    'teacher': functools.partial(logits, teacher.variables),
    **others,
  }
  results = evaluation.on_images(networks, images, config.eval.batch_size)
  if images is not None:
    results['images'] = {
      'source': config.eval.source,
      'path': config.eval.path,
      **results['images'],
    }
  return results


@precision.in_float32
@bucket.on_copy
def evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Evaluates a finished run on the images that `config.eval` names.

  Returns:
    results.json, of which only the evaluation's own keys have changed.

  Raises:
    InputError: no finished student in the workdir, or unfit images.
  """
  config_lib.validate(config)
  teacher = experiment.load_teacher(config)
  images = experiment.load_images(config, teacher)
  if images is None:
    raise InputError(
      "config.eval.source='none': nothing to evaluate on; expected "
      'fashion_mnist, or npz, folder or tfds and config.eval.path=PATH'
    )
  networks: dict[str, evaluation.Predict] = {}
  if config.eval.network != 'teacher':
    student = student_lib.load(workdir)
    networks['student'] = student.logits
  if config.eval.network == 'integer':
    networks['deployed'] = jax.jit(student.integer().logits)
  with workdir_lib.open_workdir(config, workdir) as folder:
    results = _on_images(config, teacher, networks, images)
    return workdir_lib.merge_results(folder, results)
