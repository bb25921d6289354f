"""samples.png and samples.npz: synthetic images as the student sees them."""

import pathlib

import numpy as np
from PIL import Image

from clusterq_jax.atomic import atomic

ROWS = 10
COLUMNS = 10
_ZOOM = 2


PICTURE = 'samples.png'
ARRAYS = 'samples.npz'


def grid(images: np.ndarray) -> np.ndarray:
  """uint8 [rows, columns, H, W, C], C 1 or 3, to one RGB picture."""
  rows, columns, height, width = images.shape[:4]
  picture = np.full(
    (rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8
  )
  for row in range(rows):
    for column in range(columns):
      top, left = row * (height + 1), column * (width + 1)
      picture[top : top + height, left : left + width] = images[row, column]
  return picture


def save(folder: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
  """Draws a grid of images, row by row; stores them for `data.read_npz`.

  Args:
    folder: gets both files.
    images: uint8 [rows, columns, H, W, C], C 1 or 3.
    labels: int [rows * columns], what was asked of the generator.
  """
  picture = Image.fromarray(grid(images))
  size = (picture.width * _ZOOM, picture.height * _ZOOM)
  with atomic(folder / PICTURE) as temporary:
    picture.resize(size, Image.Resampling.NEAREST).save(temporary, 'PNG')
  # An open file: numpy appends .npz to the name of a path.
  with atomic(folder / ARRAYS) as temporary, temporary.open('wb') as file:
    np.savez_compressed(
      file, images=images.reshape(-1, *images.shape[2:]), labels=labels
    )
