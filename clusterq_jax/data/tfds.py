"""Reads image data sets that TensorFlow Datasets (TFDS) has prepared.

The files must be in the format array_record, which needs no TensorFlow.
"""

import io
from typing import Any

import numpy as np

from clusterq_jax.data.image_files import ImageFiles
from clusterq_jax.errors import InputError

_SPLITS = ('validation', 'test')  # ImageNet's test images have no labels


def read_tfds(
  name: str, shape: tuple[int, int, int], resize: int
) -> tuple[ImageFiles, np.ndarray]:
  """Returns the validation images, or else the test images, of a data set.

  All records are read once for their labels.

  Args:
    name: name and version as in TFDS: 'imagenet2012', 'cifar10:3.0.2'. The
      data set is looked up in $TFDS_DATA_DIR or ~/tensorflow_datasets.
    shape: (H, W, C) to crop to.
    resize: see `ImageFiles`.

  Returns:
    The images and their labels, int32 [N].

  Raises:
    InputError: TFDS is not installed, the data set is not prepared, or it has
      no labelled images.
  """
  splits = _prepared_splits(name)
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


def _prepared_splits(name: str) -> dict[str, Any]:
  """Returns the prepared splits by name; their images stay encoded."""
  # Imported where it is needed: it takes half a second.
  import tensorflow_datasets as tfds

  try:
    splits = tfds.data_source(
      name, download=False, decoders={'image': tfds.decode.SkipDecoding()}
    )
    reason = 'nothing is prepared'
  except Exception as e:  # TFDS raises many kinds
    splits, reason = {}, (str(e).splitlines() or [type(e).__name__])[0]
  if not splits:
    raise InputError(
      f'eval.path={name!r}: not found as array_record in '
      f'{tfds.core.constants.DATA_DIR} ({reason}); set TFDS_DATA_DIR to its '
      'folder, or prepare it once, which needs pip install tensorflow: '
      f'tfds build {name} --file_format=array_record'
    )
  return splits
