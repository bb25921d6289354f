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
  """Top-1 of each network, and its agreement with the one before it.

  Args:
    networks: 'teacher', and perhaps 'student' and 'deployed', in this order;
      as in `predictions`.
    images: real images, or None: every figure is then None.
    batch_size: images per call.

  Returns:
    By network: `top1` in percent; but for the first also `n`, the number of
    images, and `agreement` in percent.
  """
  results: dict[str, Any] = {}
  before = None
  for name, logits in networks.items():
    figures: dict[str, Any] = {'top1': None}
    if results:
      figures |= {'n': None, 'agreement': None}
    if images is not None:
      answers = predictions(logits, images.images, batch_size)
      figures['top1'] = percent(answers == images.labels)
      if results:
        figures |= {'n': len(answers), 'agreement': percent(answers == before)}
      before = answers
    results[name] = figures
  return results
