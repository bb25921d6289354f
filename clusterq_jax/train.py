"""A run from config to results: the loop, in the order of the data's path.

No formulas here: they are in `steps.py` and what it calls.
"""

from collections.abc import Callable
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from clusterq_jax import checkpoint
from clusterq_jax import config as config_lib
from clusterq_jax import data
from clusterq_jax import evaluate as evaluate_lib
from clusterq_jax import generator as generator_lib
from clusterq_jax import metrics as metrics_lib
from clusterq_jax import samples
from clusterq_jax import sharding
from clusterq_jax import student as student_lib
from clusterq_jax import teacher as teacher_lib
from clusterq_jax.errors import InputError
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.steps import LossWeights, Steps

# Streams of random numbers of a run, folded into its seed.
_INIT, _TRAIN, _CENTROIDS, _CALIBRATION, _HELD_OUT, _SAMPLES = range(6)


class Compiler:
  """Compiles each program once, ahead of time, and counts the seconds.

  A program compiled ahead of time cannot compile again behind our back: other
  shapes are an error.
  """

  def __init__(self):
    self.seconds = 0.0

  def __call__(self, function: Callable, *args, donate: bool = False):
    start = time.monotonic()
    jitted = jax.jit(function, donate_argnums=(0,) if donate else ())
    compiled = jitted.lower(*args).compile()
    self.seconds += time.monotonic() - start
    return compiled


# ---------------------------------------------------------------- from config


def load_teacher(config: ml_collections.ConfigDict) -> teacher_lib.Teacher:
  t = config.teacher.to_dict()
  path = t.pop('weights')
  return teacher_lib.load(path=path, **t)


def bits_of(config: ml_collections.ConfigDict) -> plan_lib.Bits:
  quant = config.quant
  first, last = quant.first_weight_bits, quant.last_weight_bits
  return plan_lib.Bits(
    weights=quant.weight_bits,
    activations=quant.activation_bits,
    first=quant.weight_bits if first is None else first,
    last=quant.weight_bits if last is None else last,
    placement=quant.placement,
  )


def _learning_rate(base: float, schedule, start: int, end: int):
  """Learning rate by step; cosine runs from `start` to `end`."""
  if schedule.lr_decay == 'cosine':
    cosine = optax.cosine_decay_schedule(base, max(end - start, 1))
    return lambda step: cosine(jnp.maximum(step - start, 0))
  factors = dict.fromkeys(schedule.lr_boundaries, schedule.lr_factor)
  return optax.piecewise_constant_schedule(base, factors)


def make_steps(
  config: ml_collections.ConfigDict, teacher: teacher_lib.Teacher
) -> Steps:
  """The steps of the run that `config` describes."""
  s, loss, student = config.schedule, config.loss, config.student
  plan = plan_lib.make_plan(
    teacher.graph, bits_of(config), config.quant.ranges == 'learned'
  )
  layers = len(teacher.graph.batch_norms)
  first = config.centroids.first_layer
  if first is None:
    first = max(0, (layers + 1) // 2 - 2)
  if not 0 <= first < layers:
    raise InputError(
      f'config.centroids.first_layer={first}: expected 0 to {layers - 1}'
    )
  if student.optimizer == 'adam':
    optimizer = optax.scale_by_adam()
  else:
    optimizer = optax.chain(
      optax.add_decayed_weights(student.weight_decay),
      optax.trace(student.momentum, nesterov=True),
    )
  total = config_lib.total_steps(s)
  generator_end = total - s.student_steps
  student_start = generator_end - s.joint_steps
  rate = functools.partial(_learning_rate, schedule=s)
  return Steps(
    build=teacher.build,
    graph=teacher.graph,
    plan=plan,
    generator=generator_lib.Generator(
      shape=teacher.preprocessing.shape,
      num_classes=teacher.num_classes,
      latent_dim=config.generator.latent_dim,
      channels=tuple(config.generator.channels),
    ),
    preprocessing=teacher.preprocessing,
    weights=LossWeights(
      statistics=loss.statistics,
      sfda=loss.sfda,
      diversity=loss.diversity,
      noise=tuple(loss.noise),
      noise_relative=loss.noise_relative,
      class_reduction=loss.class_reduction,
      centroid_decay=config.centroids.decay,
      student_cross_entropy=loss.student_cross_entropy,
      distillation=loss.distillation,
    ),
    first_semantic_layer=first,
    batch_size=s.batch_size,
    pool_batches=s.pool_batches,
    augment_probability=config.augment.probability,
    augment_flip=config.augment.flip,
    range_steps=student_start + s.range_steps,
    generator_lr=rate(config.generator.lr, start=0, end=generator_end),
    student_lr=rate(student.lr, start=student_start, end=total),
    quant_lr=rate(student.quant_lr, start=student_start, end=total),
    generator_optimizer=optax.scale_by_adam(*config.generator.betas),
    student_optimizer=optimizer,
    mesh=sharding.make_mesh(s.batch_size),
  )


# -------------------------------------------------------------------- workdir


def _open_workdir(
  config: ml_collections.ConfigDict, workdir: str
) -> pathlib.Path:
  """Makes the workdir, or refuses one that holds a run of another config."""
  folder = pathlib.Path(workdir)
  file = folder / 'config.json'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists():
      changed = config_lib.differences(json.loads(file.read_text()), config)
      if changed:
        raise InputError(
          f'{workdir} holds a run with another config; it differs in '
          f'{"; ".join(changed)}. Choose another workdir, or the same config'
        )
    metrics_lib.write_json(file, config.to_dict())
  except OSError as e:
    raise InputError(f'{workdir}: cannot be written: {e.strerror}') from e
  except json.JSONDecodeError as e:
    raise InputError(f'{file}: not a config: {e}') from e
  return folder


def _merge_results(folder: pathlib.Path, new: dict[str, Any]) -> dict[str, Any]:
  """Adds to results.json, or replaces, the keys of `new`, one level deep."""
  file = folder / 'results.json'
  results = json.loads(file.read_text()) if file.exists() else {}
  for key, value in new.items():
    old = results.get(key)
    both = isinstance(old, dict) and isinstance(value, dict)
    results[key] = {**old, **value} if both else value
  metrics_lib.write_json(file, results)
  return results


# ------------------------------------------------------------------- quantize


def quantize(
  config: ml_collections.ConfigDict, workdir: str
) -> dict[str, Any]:
  """Quantizes a teacher without data; resumes what the workdir holds.

  Args:
    config: see `config.defaults()`.
    workdir: folder of the run, made when missing.

  Returns:
    What results.json holds: accuracies and agreements in percent, `wall_s` and
    `compile_s` in seconds, `peak_rss_mb` in MB.

  Raises:
    InputError: bad config, weights, images or workdir; or a loss that is no
      longer finite.
  """
  began = time.monotonic()
  config_lib.validate(config)
  teacher = load_teacher(config)
  steps = make_steps(config, teacher)
  images = _eval_images(config, teacher)
  folder = _open_workdir(config, workdir)
  compile_program = Compiler()

  # -- state: from the newest checkpoint, or from scratch
  replicated = sharding.replicated(steps.mesh)
  root = jax.random.key(config.seed)
  keys = [
    jax.device_put(jax.random.fold_in(root, i), replicated) for i in range(6)
  ]
  variables = jax.device_put(teacher.variables, replicated)
  init = jax.jit(steps.init, out_shardings=replicated)
  abstract = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated),
    jax.eval_shape(init, keys[_INIT], variables),
  )
  checkpoints = checkpoint.Checkpoints(str(folder / 'checkpoints'))
  restored = checkpoints.restore(abstract, say=print)
  if restored is None:
    state, wall_before = init(keys[_INIT], variables), 0.0
    checkpoints.save(0, state, 0.0)
  else:
    state, wall_before = restored
  done = int(state.step)
  total = config_lib.total_steps(config.schedule)

  # -- the loop
  log = metrics_lib.MetricsFile(folder / 'metrics.jsonl', done)
  progress = metrics_lib.Progress(total, done, config.schedule.batch_size)
  if restored is not None:
    progress.say(f'{workdir}: resuming at step {done} of {total}')
  s = config.schedule
  phases = (
    ('warm-up', s.warmup_steps, steps.warmup_step),
    ('generator', s.generator_steps, steps.generator_step),
    ('joint', s.joint_steps, steps.joint_step),
    ('student', s.student_steps, steps.student_step),
  )
  student_start = total - s.student_steps - s.joint_steps
  pending: list[tuple[int, str, Any]] = []

  def flush(keep: int) -> None:
    """Fetches logged metrics but the last `keep`, which may still be running."""
    while len(pending) > keep:
      step, phase, values = pending.pop(0)
      values, bad = jax.device_get(values)
      if bad >= 0:
        progress.close()
        raise InputError(
          f'the loss is no longer finite since step {bad}; the last good '
          f'checkpoint is kept in {folder / "checkpoints"}. Try a lower '
          'config.generator.lr or config.student.lr'
        )
      log.write(step, values)
      progress.update(step, phase, values)

  loop_began, start, compile_before = time.monotonic(), done, 0.0
  end = 0
  for phase, length, step_fn in phases:
    first, end = end, end + length
    if done >= end:
      continue
    program = compile_program(
      step_fn, state, variables, keys[_TRAIN], donate=True
    )
    for step in range(done, end):
      if step == s.warmup_steps == first:
        state = _initialize_centroids(
          config, steps, compile_program, state, variables, keys[_CENTROIDS]
        )
      if step == student_start == first:
        calibrate = compile_program(
          steps.calibrate_student,
          state,
          variables,
          keys[_CALIBRATION],
          donate=True,
        )
        state = calibrate(state, variables, keys[_CALIBRATION])
      state, values = program(state, variables, keys[_TRAIN])
      done = step + 1
      if done % config.report.log_every == 0 or done == total:
        # A copy: the state itself is donated to the next step.
        pending.append((done, phase, (values, jnp.copy(state.bad_step))))
        flush(keep=1)
      if done % config.checkpoint_every == 0 or done == total:
        flush(keep=0)
        if int(state.bad_step) < 0:
          wall = wall_before + time.monotonic() - began
          checkpoints.save(done, state, wall)
  flush(keep=0)
  progress.close()
  loop_s = time.monotonic() - loop_began - compile_program.seconds
  loop_s += compile_before
  rate = (done - start) * s.batch_size / loop_s if done > start else None

  # -- what came out of it
  student_variables = {
    **state.student,
    'batch_stats': variables['batch_stats'],
  }
  bits = bits_of(config)
  student_lib.save(
    folder / student_lib.FILE,
    student_variables,
    config.teacher.arch,
    teacher.options,
    bits,
    steps.plan.learned,
    teacher.preprocessing,
    teacher.class_names,
  )
  synthetic = _synthetic_agreement(
    config, steps, compile_program, state, variables, keys[_HELD_OUT]
  )
  drawn, labels = jax.jit(steps.generate)(state.generator, keys[_SAMPLES])
  samples.save(
    folder / 'samples.png',
    np.asarray(teacher.preprocessing.to_pixels(drawn)),
    np.asarray(labels),
  )
  results = _on_images(config, steps, compile_program, state, variables, images)
  params = variables['params']
  results |= {
    'synthetic': synthetic,
    'bits': {
      **bits.__dict__,
      'input': plan_lib.WIDE_BITS,
      'classifier_input': plan_lib.WIDE_BITS,
    },
    'size': {
      'teacher_bytes': sum(4 * a.size for a in jax.tree.leaves(params)),
      'student_bytes': int(plan_lib.weight_bytes(params, steps.plan)),
    },
    'steps': total,
    'seed': config.seed,
    'wall_s': round(wall_before + time.monotonic() - began, 2),
    'compile_s': round(compile_program.seconds, 2),
    'images_per_s': None if rate is None else round(rate, 1),
    'peak_rss_mb': metrics_lib.peak_rss_mb(),
    'devices': [d.device_kind for d in jax.devices()],
  }
  return _merge_results(folder, results)


def _initialize_centroids(
  config, steps, compile_program, state, variables, key
):
  images = config.centroids.images_per_class * steps.num_classes
  batches = -(-images // config.schedule.batch_size)
  keys = jax.random.split(key, batches)
  program = compile_program(
    steps.initialize_centroids, state, variables, keys, donate=True
  )
  return program(state, variables, keys)


def _synthetic_agreement(
  config, steps, compile_program, state, variables, key
):
  """Agreement on images of the final generator, from noise never trained on."""

  def answers(state, variables, key):
    x, _ = steps.generate(state.generator, key)
    pixels = steps.preprocessing.to_pixels(x)
    x = steps.preprocessing.normalize(pixels)
    teacher = steps.teacher_logits(variables, x)
    student = steps.student_logits(state.student, variables, x)
    return jnp.argmax(student, -1) == jnp.argmax(teacher, -1)

  batches = -(-config.eval.synthetic_images // config.schedule.batch_size)
  program = compile_program(answers, state, variables, key)
  agree = [
    program(state, variables, k) for k in jax.random.split(key, batches)
  ]
  agree = np.concatenate(jax.device_get(agree))
  return {'agreement': evaluate_lib.percent(agree), 'n': len(agree)}


# ------------------------------------------------------------------- evaluate


def _eval_images(config, teacher) -> data.Images | None:
  return data.load(
    config.eval.source,
    config.eval.path,
    teacher.preprocessing.shape,
    teacher.num_classes,
  )


def _on_images(config, steps, compile_program, state, variables, images):
  batch = config.eval.batch_size
  pixels = jnp.zeros((batch, *steps.generator.shape), jnp.uint8)
  normalize = steps.preprocessing.normalize

  def compiled(function, *args):
    program = compile_program(
      lambda x, *args: function(*args, normalize(x)), pixels, *args
    )
    return lambda x: program(jnp.asarray(x), *args)

  networks = {'teacher': None, 'student': None}
  if images is not None:
    networks = {
      'teacher': compiled(steps.teacher_logits, variables),
      'student': compiled(steps.student_logits, state.student, variables),
    }
  return evaluate_lib.on_images(networks, images, batch)


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Evaluates a finished run on the images that `config.eval` names.

  Returns:
    results.json, of which only the evaluation's own keys have changed.

  Raises:
    InputError: no finished student in the workdir, or unfit images.
  """
  config_lib.validate(config)
  teacher = load_teacher(config)
  images = _eval_images(config, teacher)
  if images is None:
    raise InputError(
      "config.eval.source='none': nothing to evaluate on; expected "
      'fashion_mnist, or npz and config.eval.path=FILE'
    )
  networks = {}
  prep, network = teacher.preprocessing, None
  from clusterq_jax.layers import float as float_layers

  network = teacher.build(float_layers.layer_set())
  networks['teacher'] = jax.jit(
    lambda x: network.apply(teacher.variables, prep.normalize(jnp.asarray(x)))
  )
  if config.eval.network == 'student':
    networks['student'] = jax.jit(student_lib.load(workdir).logits)
  folder = _open_workdir(config, workdir)
  results = evaluate_lib.on_images(networks, images, config.eval.batch_size)
  return _merge_results(folder, results)
