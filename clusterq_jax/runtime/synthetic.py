"""Compares student and teacher on generated images and saves samples."""

import pathlib
from collections.abc import Sequence
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

  def held_out(state, key):
    image_key, mix_key = jax.random.split(key)
    images, _ = networks.generate(state.generator, image_key)
    blended = augment.mixup(mix_key, images, 1.0)
    return networks.preprocessing.to_pixels(jnp.stack([images, blended], 1))

  def sample(state, key):
    labels = jnp.asarray(_sample_labels(session))
    return networks.generate(state.generator, key, labels)[0]

  state = session.abstract_state()
  session.start(sample, state, session.keys['samples'])
  session.start(held_out, state, session.keys['held_out'])


def _sample_labels(session: Session) -> np.ndarray:
  classes = min(session.steps.networks.num_classes, samples.ROWS)
  return np.repeat(np.arange(classes), samples.COLUMNS)


def held_out(session: Session, state: TrainState) -> list[np.ndarray]:
  """Generates images from new noise; every second one is a blend of two.

  On unblended images student and teacher hardly ever disagree, because the
  student was trained on similar ones. Blended images lie between classes, as
  many real images do. Every process has to call this.

  Args:
    session: session of the run.
    state: state with the generator.

  Returns:
    Images, uint8 [H, W, C] each; at least `HELD_OUT` of either kind.
  """
  prepare(session)
  program, found = session.wait('held_out'), []
  batches = -(-HELD_OUT // session.steps.networks.batch_size)
  for key in jax.random.split(session.keys['held_out'], batches):
    found += [*np.concatenate(jax.device_get(program(state, key)))]
  return found


def compare(
  images: Sequence[np.ndarray],
  teacher: evaluation.Predict,
  student: evaluation.Predict,
  batch_size: int,
) -> dict[str, Any]:
  """Compares student and teacher on synthetic images.

  Args:
    images: result of `held_out`.
    teacher: compiled function; see `evaluation.predictions`.
    student: compiled function; see `evaluation.predictions`.
    batch_size: images per call.

  Returns:
    `agreement` and `blended_agreement` in percent, `blended_divergence` (mean
    KL) in nats, and `n`, the number of images.
  """
  expected, found = evaluation.logits((teacher, student), images, batch_size)
  agree = np.argmax(expected, -1) == np.argmax(found, -1)
  divergence = losses.distillation_loss(found[1::2], expected[1::2])
  return {
    'agreement': evaluation.percent(agree[::2]),
    'blended_agreement': evaluation.percent(agree[1::2]),
    'blended_divergence': round(float(divergence), 6),
    'n': len(agree[::2]),
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
