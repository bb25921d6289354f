"""Labelled image files, decoded when they are looked at.

Two layouts of a folder: a sub-folder of images per class, in the order of their
names; or `labels.csv` with a header `file,label`, files relative to `images/`
beside it or to the folder itself. Or a data set that TensorFlow Datasets has
prepared as array_record, which is read without TensorFlow.

Each image is made RGB (or grey), its shorter side resized, the centre cropped:
bicubic, with Pillow. A file that cannot be decoded is noted and never raises in
the middle of an evaluation; its place holds zeros.
"""

import concurrent.futures
import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from clusterq_jax.errors import InputError

# Pillow's names of what the suffixes stand for. It goes by contents, and some
# that it knows run programs: PostScript.
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
_PIXELS = 2**26  # of an image at most, before and after it is resized
SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tiff', '.webp')
_LABELS = 'labels.csv'
_SPLITS = ('validation', 'test')  # ImageNet's test images have no labels


@dataclasses.dataclass
class ImageFiles:
  """Looks like an array uint8 [N, H, W, C], of which slices are decoded.

  Attributes:
    open: the file of an index, or its path.
    name: what an index is called in messages.
    shape: (N, H, W, C).
    resize: length of the shorter side before the crop; 0: as it is.
    broken: why a file could not be decoded, by index; filled on the way.
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
    """Decodes a slice, in parallel: Pillow lets go of the interpreter."""
    indices = range(len(self))[rows]
    return np.stack(list(self._workers.map(self._decode, indices)))

  def _decode(self, index: int) -> np.ndarray:
    _, height, width, channels = self.shape
    try:
      with Image.open(self.open(index), formats=_FORMATS) as file:
        _check_pixels(file.size)
        image = file.convert('L' if channels == 1 else 'RGB')
      if self.resize:
        scale = self.resize / min(image.size)
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


def _check_pixels(size: tuple[int, int]) -> None:
  width, height = size
  if width * height > _PIXELS:
    raise ValueError(
      f'{width} x {height} pixels; expected at most {_PIXELS:,} in all'
    )


def read_folder(
  folder: str, shape: tuple[int, int, int], resize: int
) -> tuple[ImageFiles, np.ndarray]:
  """The images of a folder and their labels, int32 [N].

  Args:
    folder: with class folders, or with labels.csv.
    shape: (H, W, C) to crop to.
    resize: see `ImageFiles`.

  Raises:
    InputError: no such folder, or neither layout in it.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise InputError(f'eval.path={folder!r}: no such folder')
  if (root / _LABELS).exists():
    paths, labels = _from_csv(root)
  else:
    paths, labels = _from_classes(root)
  files = ImageFiles(
    paths.__getitem__,
    lambda index: str(paths[index]),
    (len(paths), *shape),
    resize,
  )
  return files, np.array(labels, np.int32)


def read_tfds(
  name: str, shape: tuple[int, int, int], resize: int
) -> tuple[ImageFiles, np.ndarray]:
  """The validation images, or else the test images, of a TFDS data set.

  Args:
    name: as TFDS spells it: 'imagenet2012', 'cifar10:3.0.2'. It lies in
      $TFDS_DATA_DIR, or else in ~/tensorflow_datasets.
    shape: (H, W, C) to crop to.
    resize: see `ImageFiles`.

  Returns:
    The images and their labels, int32 [N]: all records are read once for them.

  Raises:
    InputError: TFDS is not installed, the data set is not prepared, or it is
      not one of labelled images.
  """
  splits = _tfds_splits(name)
  split = next((split for split in _SPLITS if split in splits), None)
  if split is None:
    raise InputError(
      f'eval.path={name!r}: the prepared splits are {", ".join(splits)}; '
      f'expected {" or ".join(_SPLITS)}'
    )
  source = splits[split]
  features = list(source.dataset_info.features)
  if not {'image', 'label'} <= set(features):
    raise InputError(
      f'eval.path={name!r}: its features are {", ".join(features)}; expected '
      'image and label'
    )
  try:
    labels = np.array([example['label'] for example in source])
  except Exception as e:  # a damaged file raises many kinds
    reason = ' '.join(str(e).split())
    raise InputError(f'eval.path={name!r}: cannot be read ({reason})') from e
  if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
    raise InputError(
      f'eval.path={name!r}: labels are {labels.dtype} {list(labels.shape)}; '
      'expected a class number for each image'
    )
  files = ImageFiles(
    lambda index: io.BytesIO(source[index]['image']),
    lambda index: f'{name}, {split} image {index}',
    (len(source), *shape),
    resize,
  )
  return files, labels.astype(np.int32)


def _tfds_splits(name: str) -> dict[str, Any]:
  """The prepared splits by name, images left encoded."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as e:
    raise InputError(
      f"eval.source='tfds': {e}; pip install tensorflow-datasets array_record"
    ) from e
  try:
    splits = tfds.data_source(
      name, download=False, decoders={'image': tfds.decode.SkipDecoding()}
    )
    reason = 'nothing is prepared'
  except Exception as e:  # it raises many kinds
    splits, reason = {}, (str(e).splitlines() or [type(e).__name__])[0]
  if not splits:
    raise InputError(
      f'eval.path={name!r}: not found as array_record in '
      f'{tfds.core.constants.DATA_DIR} ({reason}); set TFDS_DATA_DIR to its '
      'folder, or prepare it once, which needs pip install tensorflow: '
      f'tfds build {name} --file_format=array_record'
    )
  return splits


def _from_classes(root: pathlib.Path) -> tuple[list[pathlib.Path], list[int]]:
  classes = sorted(path for path in root.iterdir() if path.is_dir())
  found = [
    (path, label)
    for label, folder in enumerate(classes)
    for path in sorted(folder.iterdir())
    if path.suffix.lower() in SUFFIXES
  ]
  if not found:
    raise InputError(
      f'{root}: found no images; expected a sub-folder of images per class, or '
      f'{_LABELS} with the header file,label'
    )
  return [path for path, _ in found], [label for _, label in found]


def _from_csv(root: pathlib.Path) -> tuple[list[pathlib.Path], list[int]]:
  table = root / _LABELS
  images = root / 'images'
  base = images if images.is_dir() else root
  paths, labels = [], []
  with table.open(newline='', encoding='utf-8', errors='replace') as file:
    rows = csv.DictReader(file)
    try:
      if not {'file', 'label'} <= set(rows.fieldnames or ()):
        raise InputError(
          f'{table}: columns are {rows.fieldnames}; expected file,label'
        )
      for row in rows:
        label = (row['label'] or '').strip()
        if not row['file'] or not (label.isdecimal() and len(label) < 10):
          raise InputError(
            f'{table}: line {rows.line_num}: file {row["file"]!r}, label '
            f'{label!r}; expected a file name and a class number'
          )
        paths.append(base / row['file'])
        labels.append(int(label))
    except csv.Error as e:
      raise InputError(f'{table}: line {rows.line_num}: {e}') from e
  if not paths:
    raise InputError(f'{table}: holds no images; expected a line for each')
  return paths, labels
