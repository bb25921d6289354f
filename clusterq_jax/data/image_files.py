"""Labelled image files, decoded when they are looked at.

Two layouts of a folder: a sub-folder of images per class, see `_labels_of`; or
`labels.csv` with a header `file,label`, files relative to `images/` in the
folder or to the folder itself. Or a data set that TensorFlow Datasets has
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
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from clusterq_jax.errors import InputError

# Pillow's names of formats of pictures. It knows others too: some run programs
# (PostScript), some hold no pictures.
_FORMATS = tuple(
  'AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 PCX PNG PPM QOI SGI TGA TIFF '
  'WEBP XBM'.split()
)
SUFFIXES = frozenset(
  suffix
  for suffix, kind in Image.registered_extensions().items()
  if kind in _FORMATS
)
# Grey values of 16 bits: their white is 65535, ours 255.
_SIXTEEN_BITS = ('I;16', 'I;16B', 'I;16L', 'I;16N')
_PIXELS = 2**26  # of an image at most, before and after it is resized
_LABELS = 'labels.csv'
# What operating systems and tools leave in folders.
_SYSTEM = ('__MACOSX', '__pycache__', 'System Volume Information', 'lost+found')
_SYSTEM_STARTS = ('.', '@', '$')
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
        image = _eight_bits(file).convert('L' if channels == 1 else 'RGB')
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


def _eight_bits(image: Image.Image) -> Image.Image:
  """The image with values from 0 to 255: Pillow's own conversion clips them.

  Raises:
    ValueError: nothing says which value is white.
  """
  # Pillow widens 16-bit grey of these formats to 32 bits.
  widened = image.mode == 'I' and image.format in ('PNG', 'PPM')
  if image.mode in _SIXTEEN_BITS or widened:
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))
  if image.mode in ('I', 'F'):
    kind = {'I': 'whole numbers of 32 bits', 'F': 'floating-point numbers'}
    raise ValueError(
      f'its pixels are {kind[image.mode]}, and nothing says which value is '
      'white; expected 8 or 16 bits'
    )
  return image


def _check_pixels(size: tuple[int, int]) -> None:
  width, height = size
  if width * height > _PIXELS:
    raise ValueError(
      f'{width} x {height} pixels; expected at most {_PIXELS:,} in all'
    )


def read_folder(
  folder: str,
  shape: tuple[int, int, int],
  resize: int,
  num_classes: int,
  class_names: Sequence[str] = (),
) -> tuple[ImageFiles, np.ndarray]:
  """The images of a folder and their labels, int32 [N].

  Args:
    folder: with class folders, or with labels.csv.
    shape: (H, W, C) to crop to.
    resize: see `ImageFiles`.
    num_classes: K.
    class_names: K names of classes, or none.

  Raises:
    InputError: no such folder, neither layout in it, or class folders that
      leave open which class they are.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise InputError(f'eval.path={folder!r}: no such folder')
  if (root / _LABELS).exists():
    paths, labels = _from_csv(root)
  else:
    paths, labels = _from_classes(root, num_classes, class_names)
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


def _from_classes(
  root: pathlib.Path, num_classes: int, class_names: Sequence[str]
) -> tuple[list[pathlib.Path], list[int]]:
  folders = sorted(
    path
    for path in root.iterdir()
    if path.is_dir() and not _is_system(path.name)
  )
  files = [
    [path for path in sorted(folder.iterdir()) if not _is_system(path.name)]
    for folder in folders
  ]
  images = [
    [path for path in found if path.suffix.lower() in SUFFIXES]
    for found in files
  ]
  if not any(images):
    raise InputError(
      f'{root}: found no images; expected a sub-folder of images per class, or '
      f'{_LABELS} with the header file,label'
    )
  names = [folder.name for folder in folders]
  labels, rule = _labels_of(root, names, num_classes, class_names)
  others = [
    path.name
    for found, kept in zip(files, images, strict=True)
    for path in sorted(set(found) - set(kept))
  ]
  if others:
    rule += f'; passed over: {len(others)} files that are no images ('
    rule += ', '.join(others[:3]) + ', ...' * (len(others) > 3) + ')'
  print(f'{root}: {rule}', file=sys.stderr)
  return (
    [path for found in images for path in found],
    [label for label, found in zip(labels, images, strict=True) for _ in found],
  )


def _is_system(name: str) -> bool:
  return name in _SYSTEM or name.startswith(_SYSTEM_STARTS)


def _labels_of(
  root: pathlib.Path,
  names: list[str],
  num_classes: int,
  class_names: Sequence[str],
) -> tuple[list[int], str]:
  """The label of each class folder, and the rule that gave it.

  Names of classes decide; else numbers are labels; else the order counts, if
  there is a folder for every class.

  Raises:
    InputError: none of the three rules applies.
  """
  # No folder has a slash in its name.
  number = {n.replace('/', '_'): label for label, n in enumerate(class_names)}
  unknown = [name for name in names if name not in number]
  if class_names and not unknown and len(number) == len(class_names):
    return [number[name] for name in names], (
      'class folders are named as the classes of the weights file'
    )
  if all(name.isascii() and name.isdecimal() for name in names):
    labels = [int(name) if len(name) < 10 else 10**9 for name in names]
    wrong = [n for n, k in zip(names, labels, strict=True) if k >= num_classes]
    if wrong:
      raise InputError(
        f'{root}: class folder {wrong[-1]!r}: expected numbers from 0 to '
        f'{num_classes - 1}; labels count from 0, not from 1'
      )
    return labels, 'class folders are named by their labels'
  if 0 < len(unknown) < len(names):
    raise InputError(
      f'{root}: class folder {unknown[0]!r} is no class of the weights file, '
      f'but {len(names) - len(unknown)} others are; expected names of classes '
      f'only ({", ".join(class_names[:3])}, ...)'
    )
  if len(names) != num_classes:
    raise InputError(
      f'{root}: {len(names)} class folders ({", ".join(names[:3])}, ...) for '
      f'{num_classes} classes; expected one for each class, or folders named '
      f'by their labels, 0 to {num_classes - 1}, or as the classes of the '
      'weights file'
    )
  return list(range(num_classes)), (
    f'class folders in the order of their names are labels 0 ({names[0]}) to '
    f'{num_classes - 1} ({names[-1]})'
  )


def _from_csv(root: pathlib.Path) -> tuple[list[pathlib.Path], list[int]]:
  table = root / _LABELS
  bases = [path for path in (root / 'images', root) if path.is_dir()]
  paths, labels = [], []
  # Spreadsheets write a byte order mark, and some semicolons or tabs.
  with table.open(newline='', encoding='utf-8-sig', errors='replace') as file:
    head = file.readline()
    file.seek(0)
    delimiter = max(',;\t', key=head.count)
    rows = csv.DictReader(file, delimiter=delimiter)
    try:
      columns = [name.strip().lower() for name in rows.fieldnames or ()]
      if not {'file', 'label'} <= set(columns):
        raise InputError(
          f'{table}: columns are {rows.fieldnames}; expected file,label'
        )
      rows.fieldnames = columns
      for row in rows:
        label = (row['label'] or '').strip()
        name = (row['file'] or '').strip()
        if not name or not (label.isdecimal() and len(label) < 10):
          raise InputError(
            f'{table}: line {rows.line_num}: file {row["file"]!r}, label '
            f'{label!r}; expected a file name and a class number'
          )
        places = [base / name for base in bases]
        paths.append(next(filter(os.path.exists, places), places[0]))
        labels.append(int(label))
    except csv.Error as e:
      raise InputError(f'{table}: line {rows.line_num}: {e}') from e
  if not paths:
    raise InputError(f'{table}: holds no images; expected a line for each')
  return paths, labels
