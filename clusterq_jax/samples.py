"""samples.png: synthetic images as the student sees them."""

import pathlib

import numpy as np
from PIL import Image

_COLUMNS = 10
_ROWS = 10
_ZOOM = 2


def save(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
  """Draws a grid, one class a row, the first ten classes.

  Args:
    path: of the PNG.
    images: uint8 [N, H, W, C], C 1 or 3.
    labels: int [N].
  """
  height, width = images.shape[1:3]
  classes = np.unique(labels)[:_ROWS]
  grid = np.full(
    (len(classes) * (height + 1), _COLUMNS * (width + 1), 3), 255, np.uint8
  )
  for row, label in enumerate(classes):
    for column, image in enumerate(images[labels == label][:_COLUMNS]):
      top, left = row * (height + 1), column * (width + 1)
      grid[top : top + height, left : left + width] = image
  picture = Image.fromarray(grid)
  size = (picture.width * _ZOOM, picture.height * _ZOOM)
  temporary = path.with_suffix('.tmp')
  picture.resize(size, Image.Resampling.NEAREST).save(temporary, 'PNG')
  temporary.replace(path)
