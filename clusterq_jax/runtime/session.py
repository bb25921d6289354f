"""From a config to the objects of a run; nothing below reads a config."""

import functools
import sys

import jax.numpy as jnp
import ml_collections
import optax

from clusterq_jax import config as config_lib
from clusterq_jax import data, sharding
from clusterq_jax.errors import InputError
from clusterq_jax.method import generator as generator_lib
from clusterq_jax.method.steps import LossWeights, Steps
from clusterq_jax.models import registry
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.weights import teacher as teacher_lib


def load_teacher(config: ml_collections.ConfigDict) -> teacher_lib.Teacher:
  """The teacher that `config.teacher` names; prints notes on its weights."""
  t = config.teacher.to_dict()
  path = t.pop('weights')
  teacher = teacher_lib.load(path=path, **t)
  if sharding.is_lead():
    for note in teacher.notes:
      print(note, file=sys.stderr)
  return teacher


def bits_of(config: ml_collections.ConfigDict) -> plan_lib.Bits:
  """Bit widths and placement; first and last layer as the rest by default."""
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
    teacher.graph,
    bits_of(config),
    config.quant.ranges == 'learned',
    teacher.preprocessing.limit,
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
      # A step has no size that it should shrink to.
      optax.add_decayed_weights(
        student.weight_decay, lambda tree: {k: k == 'params' for k in tree}
      ),
      optax.trace(student.momentum, nesterov=True),
    )
  total = config_lib.total_steps(s)
  student_start = total - s.student_steps - s.joint_steps
  procedural_start = s.warmup_steps + s.generator_steps
  generator_end = (
    student_start + s.joint_steps if s.joint_steps else procedural_start
  )
  rate = functools.partial(_learning_rate, schedule=s)
  dtype = jnp.bfloat16 if config.compute_dtype == 'bfloat16' else None
  return Steps(
    build=teacher.build,
    graph=teacher.graph,
    plan=plan,
    generator=generator_lib.Generator(
      shape=teacher.preprocessing.shape,
      num_classes=teacher.num_classes,
      latent_dim=config.generator.latent_dim,
      channels=tuple(config.generator.channels),
      conditional=config.generator.conditional,
      prototypes=config.generator.prototypes,
      dtype=dtype,
    ),
    preprocessing=teacher.preprocessing,
    weights=LossWeights(
      statistics=loss.statistics,
      sfda=loss.sfda,
      diversity=loss.diversity,
      noise=tuple(loss.noise),
      relative=loss.relative,
      class_reduction=loss.class_reduction,
      centroid_decay=config.centroids.decay,
      student_cross_entropy=loss.student_cross_entropy,
      distillation=loss.distillation,
      features=loss.features,
    ),
    first_semantic_layer=first,
    batch_size=s.batch_size,
    pool_batches=s.pool_batches,
    procedural_batches=s.procedural_batches,
    procedural_start=procedural_start,
    augment_probability=config.augment.probability,
    augment_flip=config.augment.flip,
    augment_mixup=config.augment.mixup,
    augment_adversarial=config.augment.adversarial,
    range_steps=student_start + s.range_steps,
    generator_lr=rate(config.generator.lr, start=0, end=generator_end),
    student_lr=rate(student.lr, start=student_start, end=total),
    quant_lr=rate(student.quant_lr, start=student_start, end=total),
    generator_optimizer=optax.scale_by_adam(*config.generator.betas),
    student_optimizer=optimizer,
    mesh=sharding.make_mesh(s.batch_size),
    dtype=dtype,
  )


def load_images(
  config: ml_collections.ConfigDict, teacher: teacher_lib.Teacher
) -> data.Images | None:
  """The evaluation images that `config.eval` names; None for none."""
  shape, resize = teacher.preprocessing.shape, config.eval.resize
  if resize is None:
    resize = registry.architecture(config.teacher.arch).resize(min(shape[:2]))
  return data.load(
    config.eval.source,
    config.eval.path,
    shape,
    teacher.num_classes,
    resize,
    teacher.class_names,
  )
