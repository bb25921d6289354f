"""Reads labelled images for evaluation and `pretrain`, never for quantization.

Every source gives uint8 [N, H, W, C] images and int32 [N] labels. Input
normalisation belongs to the teacher (`Preprocessing`), not to the images.
"""

import gzip
import math
import pathlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clusterq_jax.data.assets import ASSETS
from clusterq_jax.data.folders import read_folder
from clusterq_jax.data.image_files import ImageFiles
from clusterq_jax.data.tfds import read_tfds
from clusterq_jax.errors import InputError, check_archive

FASHION_MNIST_CLASSES = (
  'T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot'
).split()


class Images(NamedTuple):
  """Labelled images.

  Attributes:
    images: uint8 [N, H, W, C].
    labels: int32 [N].
  """

  images: np.ndarray | ImageFiles
  labels: np.ndarray


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads an IDX file (LeCun's MNIST format) of unsigned bytes, or its .gz.

  Raises:
    InputError: the file is missing, or not a complete IDX file of unsigned
      bytes.
  """
  try:
    opened = gzip.open if path.suffix == '.gz' else open
    with opened(path, 'rb') as file:
      raw = file.read()
  except (OSError, EOFError, zlib.error) as e:
    raise InputError(f'{path}: cannot be read as an IDX file ({e})') from e
  if len(raw) < 4 or raw[:3] != b'\0\0\x08':
    raise InputError(f'{path}: expected an IDX file of unsigned bytes')
  rank = raw[3]
  shape: list[int] = []
  if len(raw) >= 4 + 4 * rank:
    shape = np.frombuffer(raw, '>u4', rank, 4).tolist()
  body = raw[4 + 4 * rank :]
  if len(shape) != rank or len(body) != math.prod(shape):
    raise InputError(f'{path}: truncated: {len(body)} bytes for shape {shape}')
  return np.frombuffer(body, np.uint8).reshape(shape)


def read_fashion_mnist(folder: pathlib.Path, split: str) -> Images:
  """Reads Fashion-MNIST from IDX files.

  Args:
    folder: the folder with the four files, with or without .gz.
    split: 'train' or 't10k'.

  Raises:
    InputError: a file is missing or damaged.
  """
  arrays = []
  for kind in ('images-idx3', 'labels-idx1'):
    path = folder / f'{split}-{kind}-ubyte'
    arrays.append(read_idx(path if path.exists() else path.with_suffix('.gz')))
  return Images(arrays[0][..., None], arrays[1].astype(np.int32))


def read_npz(path: str) -> Images:
  """Reads an .npz with `images` uint8 [N, H, W, C] and `labels` int [N].

  Raises:
    InputError: the file is missing, no .npz, or has other contents.
  """
  try:
    check_archive(path)
    with np.load(path, allow_pickle=False) as file:
      missing = {'images', 'labels'} - set(file.files)
      if missing:
        raise InputError(
          f'{path}: no array {sorted(missing)}; found {file.files}; expected '
          "'images' uint8 [N, H, W, C] and 'labels' int [N]"
        )
      images, labels = file['images'], file['labels']
  except FileNotFoundError as e:
    raise InputError(f'eval.path={path!r}: no such file') from e
  except InputError:
    raise
  except Exception as e:  # numpy and zipfile raise a dozen kinds
    reason = ' '.join(str(e).split())
    raise InputError(f'{path}: cannot be read as an .npz ({reason})') from e
  if images.dtype != np.uint8 or images.ndim != 4:
    raise InputError(
      f"{path}: 'images' is {images.dtype} {list(images.shape)}; expected "
      'uint8 [N, H, W, C]'
    )
  if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
    raise InputError(
      f"{path}: 'labels' is {labels.dtype} {list(labels.shape)}; expected "
      'int [N]'
    )
  if len(images) != len(labels) or not len(images):
    raise InputError(
      f'{path}: {len(images)} images and {len(labels)} labels; expected '
      'equal numbers, at least one'
    )
  if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
    raise InputError(
      f'{path}: labels run from {labels.min()} to {labels.max()}; expected '
      'class numbers'
    )
  return Images(images, labels.astype(np.int32))


def load(
  source: str,
  path: str,
  shape: tuple[int, int, int],
  num_classes: int,
  resize: int = 0,
  class_names: Sequence[str] = (),
) -> Images | None:
  """Reads the evaluation images that the config's section `eval` names.

  Args:
    source: 'none', 'fashion_mnist' (embedded test images), 'npz', 'folder' or
      'tfds'.
    path: path of the file or folder, or name of the data set.
    shape: (H, W, C) that the teacher expects.
    num_classes: K; labels are 0..K-1.
    resize: length of the shorter side of an image file before the centre crop,
      in pixels; 0 keeps the size.
    class_names: K names of classes, which folders can have, or none.

  Returns:
    The images, or None for 'none'.

  Raises:
    InputError: the images do not fit the teacher.
  """
  if source == 'none':
    return None
  if source in ('folder', 'tfds') and shape[2] > 3:
    raise InputError(
      f'config.eval.source={source!r}: reads images of 1 or 3 channels; the '
      f'teacher expects {shape[2]}: use npz'
    )
  if source == 'fashion_mnist':
    name, images = source, read_fashion_mnist(ASSETS, 't10k')
  elif source == 'folder':
    found = read_folder(path, shape, resize, num_classes, class_names)
    name, images = path, Images(*found)
  elif source == 'tfds':
    name, images = path, Images(*read_tfds(path, shape, resize))
  else:
    name, images = path, read_npz(path)
  if images.images.shape[1:] != shape:
    raise InputError(
      f'{name}: images are {list(images.images.shape[1:])} (H, W, C); the '
      f'teacher expects {list(shape)}'
    )
  low, high = images.labels.min(), images.labels.max()
  if low < 0 or high >= num_classes:
    raise InputError(
      f'{name}: labels run from {low} to {high}; the teacher has '
      f'{num_classes} classes, 0..{num_classes - 1}'
    )
  return images
