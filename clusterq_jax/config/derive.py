"""Derives from a network what its generator and its schedule need.

The rules go through the values that were tuned at 32 x 32 and 224 x 224 pixels.
Between and beyond, they keep the pixels of a step and of a run about constant.
"""

import math
from typing import Any

_BATCH = 64  # of the short recipe
_LEAST_BATCH = 8
_PIXELS_OF_A_BATCH = 2**20  # at most
_PIXELS_OF_A_STEP = 2**17  # of a run at budget 1; more shorten the run
_PIXELS_OF_AN_EVALUATION = 2.5e6  # at most, per call
_MOST_CHANNELS = 128
_LEAST_SIDE = 7  # about the side of the generator's lowest resolution
_CENTROID_BATCHES = 50  # at most, unless one image per class needs more


def _power_of_two(limit: float) -> int:
  """Returns the largest power of two that is at most `limit`, at least 1."""
  return 2 ** max(0, math.floor(math.log2(limit)))


def generator_channels(image_size: tuple[int, int]) -> tuple[int, ...]:
  """Returns the generator's channels, from the lowest resolution.

  The resolution doubles from about 7 x 7 to that of the images. From the
  highest resolution down, the channels double up to 128. Upwards, they shrink
  by a quarter at least.

  Args:
    image_size: (H, W) in pixels.
  """
  side = math.sqrt(math.prod(image_size))
  doublings = max(1, round(math.log2(side / _LEAST_SIDE)))
  last = min(32, max(8, _power_of_two(2048 / side)))
  return tuple(
    int(min(last * 2 ** (doublings - i), _MOST_CHANNELS * 0.75**i))
    for i in range(doublings + 1)
  )


def batch_size(image_size: tuple[int, int]) -> int:
  """Returns the images per step: a power of two from 8 to 64.

  Args:
    image_size: (H, W) in pixels.
  """
  fitting = _power_of_two(_PIXELS_OF_A_BATCH / math.prod(image_size))
  return min(_BATCH, max(_LEAST_BATCH, fitting))


def budget(image_size: tuple[int, int]) -> float:
  """Returns the length of a run: 1, or less where a step has many pixels.

  Args:
    image_size: (H, W) in pixels.
  """
  pixels = batch_size(image_size) * math.prod(image_size)
  return 1 / max(1, round(pixels / _PIXELS_OF_A_STEP))


def images_per_class(image_size: tuple[int, int], num_classes: int) -> int:
  """Returns the images that initialise the centroid of a class: 1 to 32.

  Args:
    image_size: (H, W) in pixels.
    num_classes: K.
  """
  images = _CENTROID_BATCHES * batch_size(image_size)
  return min(32, max(1, images // num_classes))


def first_semantic_layer(batch_norms: int) -> int:
  """Returns the index of the first BatchNorm with class terms.

  Args:
    batch_norms: number L of BatchNorms.
  """
  return max(0, (batch_norms + 1) // 2 - 2)


def values(image_size: tuple[int, int], num_classes: int) -> dict[str, Any]:
  """Returns the values of the config fields that follow from the network.

  Args:
    image_size: (H, W) in pixels.
    num_classes: K.

  Returns:
    Values by dotted name of the field.
  """
  batch = batch_size(image_size)
  evaluated = round(_PIXELS_OF_AN_EVALUATION / math.prod(image_size))
  return {
    'budget': budget(image_size),
    'generator.channels': generator_channels(image_size),
    'student.lr': 6e-4 * batch / _BATCH,
    'student.quant_lr': 2e-3 * batch / _BATCH,
    'centroids.images_per_class': images_per_class(image_size, num_classes),
    'schedule.batch_size': batch,
    'eval.batch_size': min(_BATCH, max(1, evaluated)),
  }
