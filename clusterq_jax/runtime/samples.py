"""Writes samples.png and samples.npz: images that the student is trained on."""

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
  """Arranges images in a grid, with one white pixel between them.

  Args:
    images: uint8 [rows, columns, H, W, C] with C = 1, 3 or 4; a fourth channel
      is not shown.

  Returns:
    RGB picture, uint8 [rows * (H + 1) - 1, columns * (W + 1) - 1, 3].
  """
  images = images[..., :3]
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
  """Writes a picture of the images and a file for `data.read_npz`.

  Args:
    folder: folder to write both files to.
    images: uint8 [rows, columns, H, W, C] with C = 1, 3 or 4.
    labels: classes requested from the generator, int [rows * columns].
  """
  picture = Image.fromarray(grid(images))
  size = (picture.width * _ZOOM, picture.height * _ZOOM)
  with atomic(folder / PICTURE) as temporary:
    picture.resize(size, Image.Resampling.NEAREST).save(temporary, 'PNG')
  # numpy appends .npz to a path, but not to an open file.
  with atomic(folder / ARRAYS) as temporary, temporary.open('wb') as file:
    np.savez_compressed(
      file, images=images.reshape(-1, *images.shape[2:]), labels=labels
    )
