"""Compares student and teacher on generated images and saves samples."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax import sharding
from clusterq_jax.method import augment, losses
from clusterq_jax.method.state import TrainState
from clusterq_jax.runtime import evaluation, samples
from clusterq_jax.runtime.session import Session

HELD_OUT = 2048  # images; the forecast was fitted with this number


def prepare(session: Session) -> None:
  """Begins to compile the programs of this module."""
  networks = session.steps.networks

  def pair(state, variables, x):
    teacher = networks.teacher_logits(variables, x)
    student = networks.student_logits(state.student, variables, x)
    agree = jnp.argmax(student, -1) == jnp.argmax(teacher, -1)
    return agree, losses.distillation_loss(student, teacher)

  def compare(state, variables, key):
    image_key, mix_key = jax.random.split(key)
    images, _ = networks.generate(state.generator, image_key)
    x = networks.preprocessing.to_pixels(images)
    x = networks.preprocessing.normalize(x)
    blended = augment.mixup(mix_key, x, 1.0)
    # A loop compiles the two networks once.
    return jax.lax.map(
      lambda x: pair(state, variables, x), jnp.stack([x, blended])
    )

  def sample(state, key):
    labels = jnp.asarray(_sample_labels(session))
    return networks.generate(state.generator, key, labels)[0]

  state = session.abstract_state()
  session.start(sample, state, session.keys['samples'])
  session.start(compare, state, session.variables, session.keys['held_out'])


def _sample_labels(session: Session) -> np.ndarray:
  classes = min(session.steps.networks.num_classes, samples.ROWS)
  return np.repeat(np.arange(classes), samples.COLUMNS)


def compare(session: Session, state: TrainState) -> dict[str, Any]:
  """Compares student and teacher on images generated from new noise.

  On unblended images the two hardly ever disagree, because the student was
  trained on similar ones. Blended images lie between classes, as many real
  images do.

  Args:
    session: session of the run.
    state: state with the final student.

  Returns:
    `agreement` and `blended_agreement` in percent, `blended_divergence` (mean
    KL) in nats, and `n`, the number of images.
  """
  prepare(session)
  program, variables = session.wait('compare'), session.variables
  batches = -(-HELD_OUT // session.steps.networks.batch_size)
  keys = jax.random.split(session.keys['held_out'], batches)
  found = jax.device_get([program(state, variables, key) for key in keys])
  session.forget('compare')
  whole, blended = np.concatenate([agree for agree, _ in found], -1)
  divergence = float(np.mean([divergence for _, (_, divergence) in found]))
  return {
    'agreement': evaluation.percent(whole),
    'blended_agreement': evaluation.percent(blended),
    'blended_divergence': round(divergence, 6),
    'n': len(whole),
  }


def save_samples(
  session: Session, state: TrainState, folder: pathlib.Path
) -> None:
  """Writes samples.png and samples.npz, with one class per row.

  Every process has to call this; only the lead writes.

  Args:
    session: session of the run.
    state: state with the generator.
    folder: folder to write both files to.
  """
  prepare(session)
  x = session.wait('sample')(state, session.keys['samples'])
  if sharding.is_lead():
    preprocessing = session.steps.networks.preprocessing
    pixels = np.asarray(preprocessing.to_pixels(jax.device_get(x)))
    shape = (-1, samples.COLUMNS, *pixels.shape[1:])
    samples.save(folder, pixels.reshape(shape), _sample_labels(session))
