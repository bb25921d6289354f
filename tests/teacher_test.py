"""Real teachers: the embedded one, and a converted .th file."""

import jax
import numpy as np
import pytest

from clusterq_jax import data, evaluation, teacher, weights
from clusterq_jax.errors import InputError
from clusterq_jax.layers import float as float_layers

EMBEDDED_TOP1 = 93.21
_CIFAR = {
  'image_size': (32, 32),
  'mean': (0.485, 0.456, 0.406),
  'std': (0.229, 0.224, 0.225),
}


def _top1(loaded: teacher.Teacher, images: data.Images) -> float:
  network = loaded.build(float_layers.layer_set())

  @jax.jit
  def logits(pixels):
    return network.apply(
      loaded.variables, loaded.preprocessing.normalize(pixels)
    )

  answers = evaluation.predictions([logits], images.images, 250)[0]
  return evaluation.percent(answers == images.labels)


@pytest.mark.torch
def test_converted_cifar10_weights_keep_their_accuracy(data_dir):
  pytest.importorskip('torch')
  path = data_dir / 'weights' / 'resnet20-12fca82f.th'
  loaded = teacher.load('resnet20', str(path), num_classes=10, **_CIFAR)
  images = data.load(
    'npz', str(data_dir / 'cifar10_dev.npz'), loaded.preprocessing.shape, 10
  )
  assert _top1(loaded, images) == 91.68


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
    ({'mean': (0.1, 0.2)}, '2 and 1 values; .* takes 1 channels'),
    ({'std': (0.0,)}, r'teacher\.std=\(0\.0,\): expected positive'),
    ({'num_classes': 12}, 'has 10 classes; config.teacher.num_classes=12'),
  ],
)
def test_what_does_not_fit_the_weights_is_refused(changes, message):
  with pytest.raises(InputError, match=message):
    teacher.load('resnet20', teacher.EMBEDDED, **changes)


def test_a_missing_file_comes_with_its_hint():
  with pytest.raises(InputError, match='no file no.th; make it'):
    teacher.load('resnet20', 'no.th', hint='make it')


def test_the_embedded_teacher_is_as_good_as_the_readme_says():
  loaded = teacher.load('resnet20', teacher.EMBEDDED)
  assert loaded.class_names[9] == 'Ankle-boot'
  images = data.load(
    'fashion_mnist', '', loaded.preprocessing.shape, loaded.num_classes
  )
  assert images.images.shape == (10_000, 28, 28, 1)
  np.testing.assert_array_equal(np.bincount(images.labels), [1000] * 10)
  assert _top1(loaded, images) == EMBEDDED_TOP1
