"""Folders of image files: what is read, how it is cropped, what is refused."""

import numpy as np
import pytest
from PIL import Image

from clusterq_jax import data, evaluation
from clusterq_jax.errors import InputError


def _write(path, seed, size=(16, 16), mode='RGB'):
  path.parent.mkdir(parents=True, exist_ok=True)
  channels = {'L': (), 'RGB': (3,), 'RGBA': (4,)}[mode]
  random = np.random.RandomState(seed)
  pixels = random.randint(0, 256, (size[1], size[0], *channels), np.uint8)
  Image.fromarray(pixels).save(path)
  return pixels


def _load(folder, shape=(16, 16, 3), classes=3, resize=0):
  return data.load('folder', str(folder), shape, classes, resize)


@pytest.fixture
def classes(tmp_path):
  """Two images of each of three classes; the pixels by class."""
  pixels = {}
  for label, name in enumerate(('ant', 'bee', 'cat')):
    pixels[label] = [
      _write(tmp_path / name / f'{i}.png', 10 * label + i) for i in (1, 0)
    ][::-1]
  (tmp_path / 'bee' / 'notes.txt').write_text('not an image')
  (tmp_path / 'readme.txt').write_text('nor this')
  return tmp_path, pixels


def test_class_folders(classes):
  folder, pixels = classes
  found = _load(folder)
  assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
  assert found.labels.dtype == np.int32
  assert found.images.shape == (6, 16, 16, 3)
  np.testing.assert_array_equal(found.images[2:4], pixels[1])
  np.testing.assert_array_equal(found.images[5:9], pixels[2][1:])


@pytest.mark.parametrize('where', ['images', '.'])
def test_labels_csv(tmp_path, where):
  pixels = [_write(tmp_path / where / f'{i}.png', i) for i in range(3)]
  (tmp_path / 'labels.csv').write_text(
    'file,label,comment\n2.png,0,x\n0.png,2,\n1.png,1,y\n'
  )
  found = _load(tmp_path)
  assert found.labels.tolist() == [0, 2, 1]
  np.testing.assert_array_equal(
    found.images[:3], [pixels[2], pixels[0], pixels[1]]
  )


def test_resize_and_crop(tmp_path):
  pixels = _write(tmp_path / 'a' / '0.png', 0, size=(40, 24))
  (found,) = _load(tmp_path, (16, 12, 3)).images[:1]
  np.testing.assert_array_equal(found, pixels[4:20, 14:26])
  # The shorter side becomes 12: 20 x 12, of which the centre.
  (found,) = _load(tmp_path, (8, 8, 3), resize=12).images[:1]
  small = Image.fromarray(pixels).resize((20, 12), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(found, np.asarray(small)[2:10, 6:14])
  # Unless told: 8 is seven eighths of 9.
  (found,) = _load(tmp_path, (8, 8, 3), resize=None).images[:1]
  small = Image.fromarray(pixels).resize((15, 9), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(found, np.asarray(small)[0:8, 3:11])


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA'])
@pytest.mark.parametrize('channels', [1, 3])
def test_modes(tmp_path, mode, channels):
  _write(tmp_path / 'a' / '0.png', 0, mode=mode)
  (found,) = _load(tmp_path, (16, 16, channels)).images[:1]
  with Image.open(tmp_path / 'a' / '0.png') as file:
    expected = np.asarray(file.convert('L' if channels == 1 else 'RGB'))
  np.testing.assert_array_equal(found.squeeze(), expected.squeeze())


def test_unreadable_images_are_named_and_left_out(classes, capsys):
  folder, _ = classes
  (folder / 'ant' / '1.png').write_bytes(b'not a picture')
  whole = (folder / 'cat' / '0.png').read_bytes()
  (folder / 'cat' / '0.png').write_bytes(whole[: len(whole) // 2])
  _write(folder / 'cat' / '1.png', 0, size=(16, 15))
  images = _load(folder)
  networks = {
    'teacher': lambda x: np.eye(3)[np.zeros(len(x), int)],
    'student': lambda x: np.eye(3)[np.ones(len(x), int)],
  }
  found = evaluation.on_images(networks, images, 4)
  assert found['teacher'] == {'top1': pytest.approx(100 / 3, abs=1e-3)}
  assert found['student']['n'] == 3
  assert found['student']['top1'] == pytest.approx(200 / 3, abs=1e-3)
  assert found['student']['agreement'] == 0
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 4
  for name, line in zip(('ant/1', 'cat/0', 'cat/1'), lines, strict=False):
    assert f'{name}.png' in line
  assert '16 x 15 pixels, too few' in lines[2]
  assert lines[3] == '3 images are left out'


def test_nothing_can_be_read(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / '0.png').write_bytes(b'')
  with pytest.raises(InputError, match='none of the images'):
    evaluation.on_images({'teacher': np.zeros_like}, _load(tmp_path), 4)


@pytest.mark.parametrize(
  ('table', 'expected'),
  [
    ('name,label\na.png,0\n', "columns are ['name', 'label']"),
    ('', 'columns are None; expected file,label'),
    ('file,label\n', 'holds no images'),
    ('file,label\na.png,0\nb.png,x\n', "line 3: file 'b.png', label 'x'"),
    ('file,label\na.png,-1\n', "label '-1'"),
    ('file,label\na.png\n', "label ''"),
    ('file,label\na.png,3\n', 'labels run from 3 to 3'),
  ],
)
def test_unfit_tables(tmp_path, table, expected):
  (tmp_path / 'labels.csv').write_text(table)
  with pytest.raises(InputError) as caught:
    _load(tmp_path)
  assert expected in str(caught.value)


def test_unfit_folders(tmp_path):
  with pytest.raises(InputError, match='no such folder'):
    _load(tmp_path / 'nowhere')
  (tmp_path / 'a').mkdir()
  with pytest.raises(
    InputError, match='found no images; expected a sub-folder'
  ):
    _load(tmp_path)
