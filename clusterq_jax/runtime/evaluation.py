"""Measures top-1 accuracy and agreement of networks on labelled images."""

import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax.config.fields import Eval
from clusterq_jax.data import Images
from clusterq_jax.data.image_files import ImageFiles
from clusterq_jax.deploy.student import Student
from clusterq_jax.errors import InputError
from clusterq_jax.layers import float_layers
from clusterq_jax.ops import compile as compile_options
from clusterq_jax.weights.teacher import Teacher

Predict = Callable[[Any], jax.Array]
_NAMED = 10  # largest number of unreadable files that are printed


def predictions(
  networks: Sequence[Predict],
  images: np.ndarray | ImageFiles,
  batch_size: int,
  saw: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
  """Returns each network's most likely class of every image.

  The host decodes the next batch while the device computes.

  Args:
    networks: compiled functions from uint8 [batch_size, H, W, C] to logits
      [batch_size, K].
    images: uint8 [N, H, W, C].
    batch_size: images per call; the last batch is padded.
    saw: is called with the images of every batch.

  Returns:
    Classes, int [len(networks), N].
  """
  answers = []
  for start in range(0, len(images), batch_size):
    batch = images[start : start + batch_size]
    if saw is not None:
      saw(batch)
    padded = _padded(batch, batch_size)
    classes = [jnp.argmax(network(padded), -1) for network in networks]
    answers.append([found[: len(batch)] for found in classes])
  return np.concatenate(jax.device_get(answers), 1)


def logits(
  networks: Sequence[Predict], images: Sequence[np.ndarray], batch_size: int
) -> np.ndarray:
  """Returns each network's logits of every image.

  Args:
    networks: functions as in `predictions`.
    images: uint8 [H, W, C] each.
    batch_size: images per call; the last batch is padded.

  Returns:
    float32 [len(networks), N, K].
  """
  answers = []
  for start in range(0, len(images), batch_size):
    batch = np.stack(images[start : start + batch_size])
    padded = _padded(batch, batch_size)
    answers.append([network(padded)[: len(batch)] for network in networks])
  return np.concatenate(jax.device_get(answers), 1)


def _padded(batch: np.ndarray, batch_size: int) -> np.ndarray:
  missing = batch_size - len(batch)
  return np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))


def percent(right: np.ndarray) -> float:
  """Returns the share of True values in percent, with four decimals."""
  return round(100 * float(np.mean(right)), 4)


def _report(broken: Mapping[int, str], count: int) -> None:
  """Prints the unreadable files of `count` files to stderr."""
  for index in sorted(broken)[:_NAMED]:
    print(f'unreadable: {broken[index]}', file=sys.stderr)
  if broken:
    print(f'left out: {len(broken)} of {count} images', file=sys.stderr)


def on_images(
  networks: Mapping[str, Predict], images: Images | None, batch_size: int
) -> dict[str, Any]:
  """Measures each network's top-1 and its agreement with the one before it.

  Files that cannot be decoded are named on stderr and left out.

  Args:
    networks: functions as in `predictions`, by name: 'teacher', then optionally
      'student' and 'deployed', in this order.
    images: real images; with None, every figure is None.
    batch_size: images per call.

  Returns:
    A dict with these keys:
      each network's name: `top1` in percent. Networks after the first also have
        `n`, the number of images, and `agreement` in percent.
      images: number `n` of images and `digest` of pixels and labels. Results
        with equal digests can be compared. Only with images.
      by_class: lists by class with the number `n` of images and each network's
        correct answers. Only with images and a student.

  Raises:
    InputError: no image can be decoded.
  """
  results: dict[str, Any] = {}
  answers: np.ndarray | None = None
  labels = before = np.zeros(0, np.int32)
  if images is not None:
    digest = hashlib.blake2b(digest_size=6)
    found = predictions(
      list(networks.values()),
      images.images,
      batch_size,
      lambda batch: digest.update(batch.tobytes()),
    )
    readable = np.ones(len(images.labels), bool)
    if isinstance(images.images, ImageFiles):
      readable[list(images.images.broken)] = False
      _report(images.images.broken, len(readable))
    answers, labels = found[:, readable], images.labels[readable]
    if not len(labels):
      raise InputError(
        f'config.eval.path: none of the images can be read ({len(readable)} '
        'files); expected image files that decode'
      )
    digest.update(labels.astype('<i4').tobytes())
    results['images'] = {'n': len(labels), 'digest': digest.hexdigest()}
    if 'student' in networks:
      results['by_class'] = _by_class(networks, answers, labels)
  for i, name in enumerate(networks):
    figures: dict[str, Any] = {'top1': None}
    if i:
      figures |= {'n': None, 'agreement': None}
    if answers is not None:
      figures['top1'] = percent(answers[i] == labels)
      if i:
        figures['n'] = len(labels)
        figures['agreement'] = percent(answers[i] == before)
      before = answers[i]
    results[name] = figures
  return results


def of_teacher(teacher: Teacher) -> Predict:
  """Returns a compiled function from images to the teacher's logits."""
  network = teacher.build(float_layers.layer_set())

  def logits(variables, pixels):
    return network.apply(variables, teacher.preprocessing.normalize(pixels))

  return functools.partial(compile_options.jit(logits), teacher.variables)


def of_student(student: Student) -> Predict:
  """Returns a compiled function from images to a student's logits."""
  # As an argument, the student is no constant of the program.
  logits = compile_options.jit(lambda student, x: student.logits(x))
  return functools.partial(logits, student)


def of_integer(student: Student) -> Predict:
  """Returns a compiled function from images to the integer network's logits.

  Raises:
    InputError: the student has `paper` placement.
  """
  return compile_options.jit(student.integer().logits)


def of_config(
  networks: Mapping[str, Predict], images: Images | None, section: Eval
) -> dict[str, Any]:
  """Measures networks on the images that a config describes.

  Args:
    networks: compiled functions as in `on_images`.
    images: real images, or None.
    section: the section `config.eval`.

  Returns:
    The result of `on_images`; its `images` also holds `source` and `path`.

  Raises:
    InputError: no image can be decoded.
  """
  results = on_images(networks, images, section.batch_size)
  if images is not None:
    where = {'source': section.source, 'path': section.path}
    results['images'] = {**where, **results['images']}
  return results


def _by_class(
  networks: Mapping[str, Predict], answers: np.ndarray, labels: np.ndarray
) -> dict[str, list[int]]:
  """Returns the images of each class and each network's correct answers.

  Args:
    networks: names of the networks, in the order of `answers`.
    answers: predicted classes, int [len(networks), N].
    labels: true classes, int [N].
  """
  count = int(labels.max()) + 1
  return {
    'n': np.bincount(labels, minlength=count).tolist(),
    **{
      name: np.bincount(labels[found == labels], minlength=count).tolist()
      for name, found in zip(networks, answers, strict=True)
    },
  }
