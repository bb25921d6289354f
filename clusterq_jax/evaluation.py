"""Accuracy and agreement of networks, on real and on synthetic images."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax.data import Images
from clusterq_jax.errors import InputError
from clusterq_jax.image_files import ImageFiles

Predict = Callable[[Any], jax.Array]
_NAMED = 10  # unreadable files that are named


def predictions(
  networks: Sequence[Predict],
  images: np.ndarray | ImageFiles,
  batch_size: int,
) -> np.ndarray:
  """The most likely class of every image, by every network.

  The next batch is decoded while the device works: nothing waits for answers.

  Args:
    networks: compiled, uint8 [batch_size, H, W, C] to [batch_size, K].
    images: uint8 [N, H, W, C], or what looks like it.
    batch_size: images per call; the last batch is padded.

  Returns:
    int [len(networks), N].
  """
  answers = []
  for start in range(0, len(images), batch_size):
    batch = images[start : start + batch_size]
    missing = batch_size - len(batch)
    padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
    classes = [jnp.argmax(logits(padded), -1) for logits in networks]
    answers.append([found[: len(batch)] for found in classes])
  return np.concatenate(jax.device_get(answers), 1)


def percent(right: np.ndarray) -> float:
  return round(100 * float(np.mean(right)), 4)


def _report(broken: Mapping[int, str], count: int) -> None:
  for index in sorted(broken)[:_NAMED]:
    print(f'unreadable: {broken[index]}', file=sys.stderr)
  if broken:
    print(f'left out: {len(broken)} of {count} images', file=sys.stderr)


def on_images(
  networks: Mapping[str, Predict], images: Images | None, batch_size: int
) -> dict[str, Any]:
  """Top-1 of each network, and its agreement with the one before it.

  Args:
    networks: 'teacher', and perhaps 'student' and 'deployed', in this order;
      as in `predictions`.
    images: real images, or None: every figure is then None.
    batch_size: images per call.

  Returns:
    By network: `top1` in percent; but for the first also `n`, the number of
    images, and `agreement` in percent. Files that cannot be decoded are named
    on stderr, and count for nothing.

  Raises:
    InputError: no image can be decoded.
  """
  results: dict[str, Any] = {}
  answers: np.ndarray | None = None
  labels = before = np.zeros(0, np.int32)
  if images is not None:
    found = predictions(list(networks.values()), images.images, batch_size)
    readable = np.ones(len(images.labels), bool)
    if isinstance(images.images, ImageFiles):
      readable[list(images.images.broken)] = False
      _report(images.images.broken, len(readable))
    answers, labels = found[:, readable], images.labels[readable]
    if not len(labels):
      raise InputError('eval.path: none of the images can be read')
  for i, name in enumerate(networks):
    figures: dict[str, Any] = {'top1': None}
    if results:
      figures |= {'n': None, 'agreement': None}
    if answers is not None:
      figures['top1'] = percent(answers[i] == labels)
      if results:
        figures['n'] = len(labels)
        figures['agreement'] = percent(answers[i] == before)
      before = answers[i]
    results[name] = figures
  return results
