"""Evaluation images: what is read, what is refused, and in which words."""

import gzip
import os
import struct

import numpy as np
import pytest

from clusterq_jax import data
from clusterq_jax.errors import InputError
from clusterq_jax.models.preprocessing import Preprocessing

# --- IDX ---------------------------------------------------------------------


def _idx(array):
  header = struct.pack(f'>BBBB{array.ndim}i', 0, 0, 8, array.ndim, *array.shape)
  return header + array.tobytes()


def _write(path, contents):
  if path.suffix == '.gz':
    contents = gzip.compress(contents)
  path.write_bytes(contents)
  return path


def _refusal(function, *args):
  """The one line that `function` refuses its arguments with."""
  with pytest.raises(InputError) as caught:
    function(*args)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('name', ['images', 'images.gz'])
@pytest.mark.parametrize('shape', [(5,), (2, 3, 4)])
def test_idx(tmp_path, name, shape):
  array = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
  found = data.read_idx(_write(tmp_path / name, _idx(array)))
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize('name', ['images', 'images.gz'])
@pytest.mark.parametrize('keep', [0, 3, 4, 9, 16, 39, 41])
def test_truncated_or_longer_idx(tmp_path, name, keep):
  whole = _idx(np.zeros((2, 3, 4), np.uint8)) + b'\0'  # one byte too many
  message = _refusal(data.read_idx, _write(tmp_path / name, whole[:keep]))
  assert name in message
  assert 'truncated' in message or keep < 4


@pytest.mark.parametrize(
  ('name', 'contents'),
  [
    ('floats', struct.pack('>BBBBi', 0, 0, 13, 1, 1) + bytes(4)),
    ('text', b'hello world'),
    ('negative', struct.pack('>BBBBii', 0, 0, 8, 2, -1, -1) + bytes(1)),
    ('huge', struct.pack('>BBBBiiii', 0, 0, 8, 4, *[2**16] * 4)),
    ('scalar', bytes([0, 0, 8, 0])),
  ],
)
def test_foreign_idx(tmp_path, name, contents):
  message = _refusal(data.read_idx, _write(tmp_path / name, contents))
  assert name in message


def test_unreadable_idx(tmp_path):
  assert 'absent' in _refusal(data.read_idx, tmp_path / 'absent')
  path = tmp_path / 'not.gz'
  path.write_bytes(b'hello world')
  assert 'not.gz' in _refusal(data.read_idx, path)
  whole = gzip.compress(_idx(np.arange(200, dtype=np.uint8)))
  path.write_bytes(whole[: len(whole) // 2])
  assert 'not.gz' in _refusal(data.read_idx, path)
  # A sound gzip header before a damaged stream.
  path.write_bytes(whole[:10] + b'\xff' * 50)
  assert 'not.gz' in _refusal(data.read_idx, path)


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_fashion_mnist(tmp_path, suffix):
  images = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
  _write(tmp_path / f't10k-images-idx3-ubyte{suffix}', _idx(images))
  _write(
    tmp_path / f't10k-labels-idx1-ubyte{suffix}',
    _idx(np.array([7, 3], np.uint8)),
  )
  found = data.read_fashion_mnist(tmp_path, 't10k')
  np.testing.assert_array_equal(found.images, images[..., None])
  assert found.labels.dtype == np.int32
  np.testing.assert_array_equal(found.labels, [7, 3])
  message = _refusal(data.read_fashion_mnist, tmp_path, 'train')
  assert 'train-images-idx3-ubyte' in message


# --- NPZ ---------------------------------------------------------------------

_IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
_LABELS = np.array([1, 0])


def _npz(tmp_path, **arrays):
  path = tmp_path / 'images.npz'
  np.savez(path, **arrays)
  return str(path)


def _load(path, shape=(4, 4, 3), num_classes=2):
  return data.load('npz', path, shape, num_classes)


def test_npz(tmp_path):
  # A third array is nobody's business.
  path = _npz(tmp_path, images=_IMAGES, labels=_LABELS, note=np.ones(1))
  found = _load(path)
  assert found.images.dtype == np.uint8
  assert found.labels.dtype == np.int32
  np.testing.assert_array_equal(found.images, _IMAGES)
  np.testing.assert_array_equal(found.labels, _LABELS)


def test_no_source():
  assert data.load('none', '', (4, 4, 3), 2) is None


def test_missing_npz(tmp_path):
  message = _refusal(_load, str(tmp_path / 'absent.npz'))
  assert 'eval.path=' in message
  assert 'absent.npz' in message
  assert 'no such file' in message


@pytest.mark.parametrize(
  ('images', 'labels', 'found'),
  [
    (None, _LABELS, "no array ['images']; found ['labels']"),
    (_IMAGES, None, "no array ['labels']; found ['images']"),
    (_IMAGES / 255, _LABELS, "'images' is float64 [2, 4, 4, 3]; expected"),
    (_IMAGES.astype(int), _LABELS, "'images' is int64 [2, 4, 4, 3]; expected"),
    (_IMAGES[..., 0], _LABELS, "'images' is uint8 [2, 4, 4]; expected"),
    (_IMAGES, _LABELS * 1.0, "'labels' is float64 [2]; expected int"),
    (_IMAGES, _LABELS > 0, "'labels' is bool [2]; expected int"),
    (_IMAGES, np.eye(2, dtype=int), "'labels' is int64 [2, 2]; expected int"),
    (_IMAGES, _LABELS[:1], '2 images and 1 labels'),
    (_IMAGES[:0], _LABELS[:0], '0 images and 0 labels'),
    (_IMAGES[:, :3], _LABELS, 'images are [3, 4, 3] (H, W, C); the teacher'),
    (_IMAGES[..., :1], _LABELS, 'images are [4, 4, 1] (H, W, C); the teacher'),
    (_IMAGES, _LABELS + 1, 'labels run from 1 to 2; the teacher has 2 classes'),
    (_IMAGES, _LABELS - 1, 'labels run from -1 to 0; expected class'),
    (_IMAGES, _LABELS + 2**32, f'labels run from {2**32} to {2**32 + 1}'),
    (_IMAGES, np.uint64([0, 2**64 - 1]), f'labels run from 0 to {2**64 - 1}'),
  ],
)
def test_npz_that_does_not_fit(tmp_path, images, labels, found):
  arrays = {'images': images, 'labels': labels}
  path = _npz(tmp_path, **{k: v for k, v in arrays.items() if v is not None})
  message = _refusal(_load, path)
  assert path in message
  assert found in message


def test_foreign_npz(tmp_path):
  path = tmp_path / 'images.npz'
  whole = open(_npz(tmp_path, images=_IMAGES, labels=_LABELS), 'rb').read()
  for contents in (b'', b'hello world', b'PK\3\4' + bytes(60), whole[:-40]):
    path.write_bytes(contents)
    assert str(path) in _refusal(_load, str(path))
  with open(path, 'wb') as file:
    np.save(file, _IMAGES)  # one array, no archive
  assert str(path) in _refusal(_load, str(path))
  # numpy refuses a header of this length in several lines.
  fields = np.zeros(2, [(f'field{n}', 'u1') for n in range(2000)])
  _npz(tmp_path, images=fields, labels=_LABELS)
  assert 'cannot be read' in _refusal(_load, str(path))
  assert str(tmp_path) in _refusal(_load, str(tmp_path))


class _Touch:
  """Creates a file when unpickled: stands for any code."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('bad', ['images', 'labels'])
def test_pickled_arrays_are_not_run(tmp_path, bad):
  target = tmp_path / 'created'
  touch = np.array([_Touch(target)], dtype=object)
  path = _npz(tmp_path, **{'images': _IMAGES, 'labels': _LABELS, bad: touch})
  assert 'cannot be read' in _refusal(_load, path)
  assert not target.exists()
  # The file is a live one: an unsafe read does run it.
  with np.load(path, allow_pickle=True) as file:
    _ = file[bad]
  assert target.exists()


# --- Preprocessing -----------------------------------------------------------

_RGB = Preprocessing(
  (1, 256), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
)
_BGR = Preprocessing(
  (1, 256), (103.94, 116.78, 123.68), (57.4, 57.1, 58.4), 255.0, 'bgr'
)
_GREY = Preprocessing((1, 256), (0.286,), (0.353,), channel_order='grey')
_ALL = np.arange(256, dtype=np.uint8)


def _all_pixels(preprocessing):
  """Every value in every channel, differently in each; [1, 256, C]."""
  channels = preprocessing.shape[-1]
  return np.stack([np.roll(_ALL, 85 * c) for c in range(channels)], -1)[None]


@pytest.mark.parametrize('preprocessing', [_RGB, _BGR, _GREY])
def test_normalize(preprocessing):
  pixels = _all_pixels(preprocessing)
  assert preprocessing.shape == pixels.shape
  x = preprocessing.normalize(pixels)
  assert x.dtype == np.float32
  channels = range(pixels.shape[-1])
  for c in channels:
    source = c if preprocessing is not _BGR else 2 - c
    white = 255 if preprocessing is _BGR else 1
    expected = pixels[..., source] / 255 * white - preprocessing.mean[c]
    expected /= preprocessing.std[c]
    np.testing.assert_allclose(x[..., c], expected, atol=1e-5)


@pytest.mark.parametrize('preprocessing', [_RGB, _BGR, _GREY])
def test_pixels_survive_the_round_trip(preprocessing):
  pixels = _all_pixels(preprocessing)
  found = preprocessing.to_pixels(preprocessing.normalize(pixels))
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize('preprocessing', [_RGB, _BGR, _GREY])
def test_black_and_white_are_the_limits(preprocessing):
  ends = np.broadcast_to(np.uint8([[0], [255]]), (2, len(preprocessing.mean)))
  x = np.asarray(preprocessing.normalize(ends))
  assert preprocessing.limit == pytest.approx(np.abs(x).max(), rel=1e-5)
  # What lies outside is clipped, not wrapped.
  found = preprocessing.to_pixels(x + np.array([[-1], [1]], np.float32))
  np.testing.assert_array_equal(found, ends)
