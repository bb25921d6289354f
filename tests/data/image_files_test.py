"""Image files: what is read, how it is cropped, what is refused."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from clusterq_jax import data
from clusterq_jax.config import resolve
from clusterq_jax.errors import InputError
from clusterq_jax.runtime import evaluation
from clusterq_jax.runtime import session as session_lib


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
  (found,) = _load(tmp_path, (16, 12, 3), 1).images[:1]
  np.testing.assert_array_equal(found, pixels[4:20, 14:26])
  # The shorter side becomes 12: 20 x 12, of which the centre.
  (found,) = _load(tmp_path, (8, 8, 3), 1, resize=12).images[:1]
  small = Image.fromarray(pixels).resize((20, 12), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(found, np.asarray(small)[2:10, 6:14])


def test_a_crop_that_is_not_square_fits(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
  (tmp_path / 'a').mkdir()
  Image.fromarray(pixels).save(tmp_path / 'a' / 'a.png')
  (found,) = _load(tmp_path, (8, 16, 3), 1, resize=9).images[:1]
  small = Image.fromarray(pixels).resize((18, 18), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(found, np.asarray(small)[5:13, 1:17])


def test_resize_unless_told(tmp_path, tiny_config):
  pixels = _write(tmp_path / '0' / '0.png', 0, size=(40, 24))
  tiny_config.eval.source = 'folder'
  tiny_config.eval.path = str(tmp_path)
  loaded = session_lib.load_teacher(resolve(tiny_config))
  (found,) = session_lib.load_images(resolve(tiny_config), loaded).images[:1]
  small = Image.fromarray(pixels).resize((13, 8), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(found, np.asarray(small)[:, 2:10])
  tiny_config.eval.resize = 0
  (found,) = session_lib.load_images(resolve(tiny_config), loaded).images[:1]
  np.testing.assert_array_equal(found, pixels[8:16, 16:24])


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA'])
@pytest.mark.parametrize('channels', [1, 3])
def test_modes(tmp_path, mode, channels):
  _write(tmp_path / 'a' / '0.png', 0, mode=mode)
  (found,) = _load(tmp_path, (16, 16, channels), 1).images[:1]
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
  first, *lines = capsys.readouterr().err.splitlines()
  assert 'in the order of their names are labels 0 (ant) to 2 (cat)' in first
  assert 'skipped 1 files that are not images (notes.txt)' in first
  assert len(lines) == 4
  for name, line in zip(('ant/1', 'cat/0', 'cat/1'), lines, strict=False):
    assert f'{name}.png' in line
  assert '16 x 15 pixels, too few' in lines[2]
  assert lines[3] == 'left out: 3 of 6 images'


def test_images_that_would_fill_the_memory_or_run_a_program(classes, capsys):
  folder, _ = classes
  Image.new('1', (2**14, 2**13)).save(folder / 'ant' / '0.png')
  Image.new('1', (1, 2**14)).save(folder / 'ant' / '1.png')  # 16 x 262,144
  Image.new('1', (1, 2**19)).save(folder / 'bee' / '0.png')
  postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n'
  (folder / 'bee' / '1.png').write_bytes(postscript)
  found = _load(folder, resize=16)
  evaluation.on_images({'teacher': lambda x: np.zeros((len(x), 3))}, found, 4)
  said = capsys.readouterr().err
  assert 'left out: 3 of 6 images' in said
  assert '0.png: 16384 x 8192 pixels; expected at most 67,108,864' in said
  assert '0.png: 16 x 8388608 pixels; expected at most' in said
  assert '1.png: cannot identify image file' in said


def test_nothing_can_be_read(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / '0.png').write_bytes(b'')
  with pytest.raises(InputError, match='none of the images'):
    evaluation.on_images(
      {'teacher': np.zeros_like}, _load(tmp_path, classes=1), 4
    )


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
    ('file,label\na.png,99999999999\n', "label '99999999999'"),
    (f'file,label\n{"a" * 200_000}.png,0\n', 'field larger than'),
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


# --- TensorFlow Datasets ------------------------------------------------------


def _png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  return io.BytesIO(file.getvalue())


@pytest.fixture
def prepare(tmp_path, monkeypatch):
  """Prepares a data set as array_record; TFDS writes it without TensorFlow."""
  tfds = pytest.importorskip('tensorflow_datasets')
  pytest.importorskip('array_record')
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))

  def call(name, version='1.0.0', **splits):
    image, label = tfds.features.Image, tfds.features.ClassLabel
    kinds = {'image': image(), 'label': label(num_classes=3)}
    used = {key for examples in splits.values() for key in examples[0]}

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
      VERSION = tfds.core.Version(version)
      code_path = None  # looked up to find checksums of downloads

      def _info(self):
        features = {key: kinds.get(key, tfds.features.Text()) for key in used}
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, _):
        return {name: enumerate(found) for name, found in splits.items()}

      def _generate_examples(self):
        raise NotImplementedError

    Made.name = name
    made = Made(data_dir=str(tmp_path), file_format='array_record')
    made.download_and_prepare()

  return call


def _load_tfds(name, shape=(16, 16, 3), resize=0):
  return data.load('tfds', name, shape, 3, resize)


def _examples(count=3, size=(16, 16)):
  random = np.random.RandomState(0)
  return [
    {'image': random.randint(0, 256, (*size, 3), np.uint8), 'label': i % 3}
    for i in range(count)
  ]


def _encoded(examples):
  return [{**e, 'image': _png(e['image'])} for e in examples]


@pytest.mark.parametrize(
  ('name', 'version', 'split'),
  [
    ('cifar10', '3.0.2', 'test'),  # what TFDS knows under these names
    ('imagenet2012', '5.1.0', 'validation'),
    ('mine', '1.0.0', 'test'),
  ],
)
def test_tfds(prepare, name, version, split):
  examples = _examples(5)
  other = {'validation': 'test', 'test': 'train'}[split]
  # TFDS shuffles; the labels are those of the images all the same.
  prepare(
    name, version, **{split: _encoded(examples), other: _encoded(examples[:1])}
  )
  found = _load_tfds(name)
  assert found.images.shape == (5, 16, 16, 3)
  assert found.labels.dtype == np.int32
  assert sorted(found.labels) == [0, 0, 1, 1, 2]
  known = {e['image'].tobytes(): e['label'] for e in examples}
  assert [known[image.tobytes()] for image in found.images[:]] == list(
    found.labels
  )
  assert 'tensorflow' not in sys.modules


def test_tfds_images_are_cropped_as_files_are(prepare, tmp_path):
  examples = _encoded(_examples(1, (24, 40)))
  prepare('mine', test=examples)
  folder = tmp_path / 'files' / 'a'
  folder.mkdir(parents=True)
  (folder / '0.png').write_bytes(examples[0]['image'].getvalue())
  shape, resize = (8, 8, 3), 12
  np.testing.assert_array_equal(
    _load_tfds('mine', shape, resize).images[:],
    _load(tmp_path / 'files', shape, 1, resize).images[:],
  )


def test_unreadable_tfds_images_are_named(prepare, capsys):
  examples = _encoded(_examples(3))
  examples[1]['image'] = io.BytesIO(examples[1]['image'].getvalue()[:200])
  prepare('mine', test=examples)
  capsys.readouterr()
  images = _load_tfds('mine')
  networks = {
    'teacher': lambda x: np.eye(3)[np.zeros(len(x), int)],
    'student': lambda x: np.eye(3)[np.zeros(len(x), int)],
  }
  assert evaluation.on_images(networks, images, 2)['student']['n'] == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2
  assert 'unreadable: mine, test image ' in lines[0]


def test_unfit_tfds(prepare, tmp_path):
  def refusal(name):
    with pytest.raises(InputError) as caught:
      _load_tfds(name)
    message = str(caught.value)
    assert '\n' not in message
    assert f'eval.path={name!r}' in message
    return message

  for name in ('cifar100', 'nowhere', '', 'cifar10/x', 'cifar10:1.2.3'):
    message = refusal(name)
    assert f'tfds build {name} --file_format=array_record' in message
    assert str(tmp_path) in message
  prepare('mine', train=_encoded(_examples()))
  assert 'prepared splits are train; expected' in refusal('mine')
  prepare('texts', test=[{'text': 'a', 'label': 0}])
  assert 'expected image and label' in refusal('texts')
  prepare('cut', test=_encoded(_examples()))
  (file,) = tmp_path.glob('cut/1.0.0/*array_record*')
  file.write_bytes(file.read_bytes()[:-2000])
  refusal('cut')


# --- Which class a folder is -------------------------------------------------


def _folders(root, names):
  for i, name in enumerate(names):
    _write(root / name / '0.png', i)


@pytest.mark.parametrize(
  ('folders', 'classes', 'class_names', 'labels', 'rule'),
  [
    # Sorted as text: 10 stands before 2.
    (
      [str(n) for n in range(12)],
      12,
      (),
      [0, 1, 10, 11, *range(2, 10)],
      'their labels',
    ),
    (['2', '5', '8'], 10, (), [2, 5, 8], 'by their labels'),
    ([str(n) for n in range(1, 10)], 10, (), [*range(1, 10)], 'their labels'),
    (['dog', 'ant'], 3, ('ant', 'cat', 'dog'), [0, 2], 'the weights file'),
    (['1', '0'], 2, ('1', '0'), [1, 0], 'the weights file'),
    (['a_b', 'c'], 2, ('c', 'a/b'), [1, 0], 'the weights file'),
    (['b', 'a'], 2, (), [0, 1], 'labels 0 (a) to 1 (b)'),
    (['b', 'a'], 2, ('x', 'y'), [0, 1], 'labels 0 (a) to 1 (b)'),
    (
      ['b', 'a', '.ipynb_checkpoints', '@eaDir', '__MACOSX', '$RECYCLE.BIN'],
      2,
      (),
      [0, 1],
      'labels 0 (a) to 1 (b)',
    ),
  ],
)
def test_labels_of_class_folders(
  tmp_path, capsys, folders, classes, class_names, labels, rule
):
  _folders(tmp_path, folders)
  found = data.load(
    'folder', str(tmp_path), (16, 16, 3), classes, class_names=class_names
  )
  assert found.labels.tolist() == labels
  (said,) = capsys.readouterr().err.splitlines()
  assert rule in said


@pytest.mark.parametrize(
  ('folders', 'classes', 'class_names', 'expected'),
  [
    (['1', '10'], 10, (), "'10': expected numbers from 0 to 9.*not from 1"),
    (['1', '9' * 99], 10, (), 'expected numbers from 0 to 9'),
    (['a', 'b'], 3, (), '2 class folders .* for 3 classes'),
    (['ant', 'x'], 2, ('ant', 'bee'), "'x' is no class of the weights file"),
  ],
)
def test_class_folders_that_leave_it_open(
  tmp_path, folders, classes, class_names, expected
):
  _folders(tmp_path, folders)
  with pytest.raises(InputError, match=expected):
    data.load(
      'folder', str(tmp_path), (16, 16, 3), classes, class_names=class_names
    )


# --- Depth, formats and tables -----------------------------------------------


@pytest.mark.parametrize('suffix', ['png', 'tiff', 'pgm'])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
  values = np.linspace(0, 65535, 256).reshape(16, 16)
  path = tmp_path / 'a' / f'0.{suffix}'
  path.parent.mkdir()
  Image.fromarray(values.astype(np.uint16)).save(path)
  (found,) = _load(tmp_path, (16, 16, 1), 1).images[:1]
  np.testing.assert_array_equal(found.reshape(-1), np.arange(256))
  (found,) = _load(tmp_path, (16, 16, 3), 1).images[:1]
  np.testing.assert_array_equal(found[..., 1].reshape(-1), np.arange(256))


def test_depths_without_a_defined_range_are_left_out(tmp_path, capsys):
  (tmp_path / 'a').mkdir()
  _write(tmp_path / 'a' / '0.png', 0)
  pixels = np.full((16, 16), 0.5)
  Image.fromarray(pixels.astype(np.float32)).save(tmp_path / 'a' / '1.tiff')
  Image.fromarray(pixels.astype(np.int32)).save(tmp_path / 'a' / '2.tif')
  found = _load(tmp_path, classes=1)
  evaluation.on_images({'teacher': lambda x: np.zeros((len(x), 1))}, found, 4)
  said = capsys.readouterr().err
  assert '1.tiff: its pixels are floating-point numbers' in said
  assert '2.tif: its pixels are 32-bit integers' in said
  assert 'left out: 2 of 3 images' in said


@pytest.mark.parametrize(
  ('suffix', 'kind'),
  [('tif', 'TIFF'), ('pgm', 'PPM'), ('jfif', 'JPEG'), ('avif', 'AVIF')],
)
def test_what_pillow_reads_is_read(tmp_path, suffix, kind):
  (tmp_path / 'a').mkdir()
  image = Image.new('L', (16, 16), 77)
  image.save(tmp_path / 'a' / f'0.{suffix}', kind)
  (found,) = _load(tmp_path, (16, 16, 1), 1).images[:1]
  assert abs(found.astype(int) - 77).max() <= 2


@pytest.mark.parametrize(
  'table',
  [
    b'\xef\xbb\xbffile,label\r\n0.png,0\r\n1.png,1\r\n',
    b'file,label\n 0.png ,0\n1.png , 1\n',
    b'file, label\nimages/0.png,0\nimages/1.png,1\n',
    b'File;Label\n0.png;0\n1.png;1\n',
    b'file,label\n0.png,0\nimages/1.png,1\n',
  ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, table):
  pixels = [_write(tmp_path / 'images' / f'{i}.png', i) for i in range(2)]
  (tmp_path / 'labels.csv').write_bytes(table)
  found = _load(tmp_path)
  assert found.labels.tolist() == [0, 1]
  np.testing.assert_array_equal(found.images[:2], pixels)
