"""Accuracy and agreement of networks, on real and on synthetic images."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax.data import Images

Predict = Callable[[Any], jax.Array]


def predictions(
  logits: Predict, images: np.ndarray, batch_size: int
) -> np.ndarray:
  """The most likely class of every image.

  Args:
    logits: compiled, uint8 [batch_size, H, W, C] to [batch_size, K].
    images: uint8 [N, H, W, C].
    batch_size: images per call; the last batch is padded.

  Returns:
    int [N].
  """
  answers = []
  for start in range(0, len(images), batch_size):
    batch = images[start : start + batch_size]
    missing = batch_size - len(batch)
    padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
    answers.append(jnp.argmax(logits(padded), -1)[: len(batch)])
  return np.concatenate(jax.device_get(answers))


def percent(right: np.ndarray) -> float:
  return round(100 * float(np.mean(right)), 4)


def on_images(
  networks: Mapping[str, Predict], images: Images | None, batch_size: int
) -> dict[str, Any]:
  """Top-1 of each network in percent; agreement of 'student' with 'teacher'.

  Args:
    networks: 'teacher' and / or 'student', as in `predictions`.
    images: real images, or None: every figure is then None.
    batch_size: images per call.

  Returns:
    {'teacher': {'top1'}, 'student': {'top1', 'n', 'agreement'}}, as far as the
    networks are given.
  """
  results: dict[str, Any] = {name: {'top1': None} for name in networks}
  if 'student' in results:
    results['student'] |= {'n': None, 'agreement': None}
  if images is None:
    return results
  answers = {
    name: predictions(logits, images.images, batch_size)
    for name, logits in networks.items()
  }
  for name, answer in answers.items():
    results[name]['top1'] = percent(answer == images.labels)
  if len(answers) == 2:
    results['student']['n'] = len(images.labels)
    results['student']['agreement'] = percent(
      answers['student'] == answers['teacher']
    )
  return results
