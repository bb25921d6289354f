"""Labelled image files that are decoded when they are read.

Each image becomes RGB (or grey) and is resized by its shorter side with
Pillow's bicubic filter, and its centre is cropped. A file that cannot be
decoded never raises in the middle of an evaluation. It is noted, and its pixels
are 0.
"""

import concurrent.futures
import dataclasses
import io
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

# Pillow's names of image formats. Others that it knows run programs
# (PostScript) or hold no images.
_FORMATS = tuple(
  'AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 PCX PNG PPM QOI SGI TGA TIFF '
  'WEBP XBM'.split()
)
SUFFIXES = frozenset(
  suffix
  for suffix, kind in Image.registered_extensions().items()
  if kind in _FORMATS
)
# 16-bit grey images have white at 65535 instead of 255.
_SIXTEEN_BITS = ('I;16', 'I;16B', 'I;16L', 'I;16N')
_PIXELS = 2**26  # largest number of pixels, before and after resizing


@dataclasses.dataclass
class ImageFiles:
  """Looks like an array uint8 [N, H, W, C] and decodes the slices of it.

  Attributes:
    open: returns the file at an index, or its path.
    name: returns the name of the file at an index, for messages.
    shape: (N, H, W, C).
    resize: length of the shorter side before the crop, in pixels; more if a
      crop that is not square needs it. 0 keeps the size.
    broken: reasons why files could not be decoded, by index; filled while
      decoding.
  """

  open: Callable[[int], pathlib.Path | io.BytesIO]
  name: Callable[[int], str]
  shape: tuple[int, int, int, int]
  resize: int
  broken: dict[int, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self._workers = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice) -> np.ndarray:
    """Decodes a slice in threads; Pillow releases the interpreter's lock."""
    indices = range(len(self))[rows]
    return np.stack(list(self._workers.map(self._decode, indices)))

  def _decode(self, index: int) -> np.ndarray:
    _, height, width, channels = self.shape
    try:
      with Image.open(self.open(index), formats=_FORMATS) as file:
        _check_pixels(file.size)
        image = _eight_bits(file).convert('L' if channels == 1 else 'RGB')
      if self.resize:
        # The crop's shorter side decides; its longer side has to fit as well.
        scale = max(
          self.resize * side / min(height, width) / size
          for side, size in zip((width, height), image.size, strict=True)
        )
        size = (round(image.width * scale), round(image.height * scale))
        _check_pixels(size)
        image = image.resize(size, Image.Resampling.BICUBIC)
      left, top = (image.width - width) // 2, (image.height - height) // 2
      if left < 0 or top < 0:
        raise ValueError(
          f'{image.width} x {image.height} pixels, too few for a crop of '
          f'{width} x {height}'
        )
      image = image.crop((left, top, left + width, top + height))
      return np.asarray(image, np.uint8).reshape(height, width, channels)
    except Exception as e:  # decoders raise many kinds
      reason = ' '.join(str(e).split()) or type(e).__name__
      self.broken[index] = f'{self.name(index)}: {reason}'
      return np.zeros((height, width, channels), np.uint8)


def _eight_bits(image: Image.Image) -> Image.Image:
  """Scales 16-bit grey images to 0..255; Pillow's own conversion clips them.

  Raises:
    ValueError: the value of white is unknown.
  """
  # Pillow opens 16-bit grey images of these formats as 32 bits.
  widened = image.mode == 'I' and image.format in ('PNG', 'PPM')
  if image.mode in _SIXTEEN_BITS or widened:
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))
  if image.mode in ('I', 'F'):
    kind = {'I': '32-bit integers', 'F': 'floating-point numbers'}
    raise ValueError(
      f'its pixels are {kind[image.mode]}, and the value of white is unknown; '
      'expected 8 or 16 bits'
    )
  return image


def _check_pixels(size: tuple[int, int]) -> None:
  width, height = size
  if width * height > _PIXELS:
    raise ValueError(
      f'{width} x {height} pixels; expected at most {_PIXELS:,} in all'
    )
