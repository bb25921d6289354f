"""samples.png: synthetic images as the student sees them."""

import pathlib

import numpy as np
from PIL import Image

ROWS = 10
COLUMNS = 10
_ZOOM = 2


def save(path: pathlib.Path, images: np.ndarray) -> None:
  """Draws a grid of images, row by row.

  Args:
    path: of the PNG.
    images: uint8 [rows, columns, H, W, C], C 1 or 3.
  """
  rows, columns, height, width = images.shape[:4]
  grid = np.full(
    (rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8
  )
  for row in range(rows):
    for column in range(columns):
      top, left = row * (height + 1), column * (width + 1)
      grid[top : top + height, left : left + width] = images[row, column]
  picture = Image.fromarray(grid)
  size = (picture.width * _ZOOM, picture.height * _ZOOM)
  temporary = path.with_suffix('.tmp')
  picture.resize(size, Image.Resampling.NEAREST).save(temporary, 'PNG')
  temporary.replace(path)
