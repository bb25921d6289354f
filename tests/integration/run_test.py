"""Tests the files and results of a whole run and its evaluation."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import clusterq_jax
from clusterq_jax import config as config_lib
from clusterq_jax import data, weights
from clusterq_jax.errors import InputError
from clusterq_jax.layers import float_layers
from clusterq_jax.quant import quantizers
from clusterq_jax.runtime import forecast, metrics
from clusterq_jax.runtime import workdir as workdir_lib
from clusterq_jax.runtime.evaluation import on_images

_STEPS = 10


def _results(workdir):
  return json.loads((workdir / 'results.json').read_text())


@pytest.fixture
def workdir(finished, tmp_path):
  """Returns a copy of the finished run."""
  return shutil.copytree(finished.workdir, tmp_path / 'run')


@pytest.fixture(scope='module')
def answers(finished):
  """Returns images and the classes that teacher and student predict."""
  images = np.random.RandomState(1).randint(0, 256, (45, 8, 8, 3), np.uint8)
  # Some images are flat, because a network sees all noise images alike.
  images[20:] = (
    images[20:] // 8
    + 28 * np.arange(25, dtype=np.uint8).reshape(-1, 1, 1, 1) // 3
  )
  student = clusterq_jax.load_student(finished.workdir)
  network = finished.teacher.build(float_layers.layer_set())
  prep = finished.teacher.preprocessing
  teacher = network.apply(finished.teacher.variables, prep.normalize(images))
  return (
    images,
    np.array(teacher).argmax(-1),
    np.array(jax.jit(student.logits)(images)).argmax(-1),
  )


# --- What a run leaves -------------------------------------------------------


def test_results(finished):
  results = _results(finished.workdir)
  assert results == finished.results
  assert set(results) == set(
    'teacher student synthetic forecast bits size steps seed wall_s '
    'compile_s compile_total_s images_per_s peak_rss_mb devices'.split()
  )
  assert results['teacher'] == {'top1': None}
  assert results['student'] == {'top1': None, 'n': None, 'agreement': None}
  synthetic = results['synthetic']
  assert synthetic['n'] == 2048
  assert 25 < synthetic['agreement'] <= 100
  assert 25 < synthetic['blended_agreement'] <= 100
  assert synthetic['blended_agreement'] != synthetic['agreement']
  assert results['forecast'] == forecast.drop(
    synthetic['blended_divergence'], ['8x8 pixels', '4 classes']
  )
  assert results['bits'] == {
    'weights': 4,
    'activations': 4,
    'first': 4,
    'last': 4,
    'placement': 'paper',
    'input': 8,
    'classifier_input': 8,
  }
  assert results['steps'] == _STEPS
  assert results['seed'] == 0
  assert results['devices'] == [d.device_kind for d in jax.devices()]
  assert 0 < results['compile_s'] < results['wall_s']
  assert results['images_per_s'] > 0
  assert 50 < results['peak_rss_mb'] < 50_000


def test_sizes(finished):
  leaves = jax.tree_util.tree_leaves_with_path(
    finished.teacher.variables['params']
  )
  kernels = sum(a.size for p, a in leaves if p[-1].key == 'kernel')
  others = sum(a.size for p, a in leaves if p[-1].key != 'kernel')
  assert finished.results['size'] == {
    'teacher_bytes': 4 * (kernels + others),
    'student_bytes': kernels // 2 + 4 * others,
  }


def test_files(finished):
  assert {path.name for path in finished.workdir.iterdir()} == {
    'student.safetensors',
    'results.json',
    'samples.png',
    'samples.npz',
    'metrics.jsonl',
    'config.json',
    'checkpoints',
    '.lock',
  }
  kept = {path.name for path in (finished.workdir / 'checkpoints').iterdir()}
  assert kept == {'8', '10'}
  stored = json.loads((finished.workdir / 'config.json').read_text())
  assert stored == config_lib.to_json(finished.session.config)


def test_metrics(finished):
  text = (finished.workdir / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [line['step'] for line in lines] == list(range(1, _STEPS + 1))
  assert all(math.isfinite(v) for line in lines for v in line.values())
  for line in lines:
    phase = line['step'] - 1
    assert ('generator/loss' in line) == (phase < 7)
    assert (line.get('generator/sfda', 0) > 0) == (2 <= phase < 7)
    assert ('student/loss' in line) == (phase >= 5)
  losses = [line.get('student/loss') for line in lines[7:]]
  assert len(set(losses)) == 3


def test_samples_are_the_generators_images(finished, state_at):
  picture = Image.open(finished.workdir / 'samples.png')
  picture.load()
  assert picture.mode == 'RGB'
  key = finished.session.keys['samples']
  labels = np.repeat(np.arange(4), 10)
  generate = jax.jit(finished.networks.generate)
  x, _ = generate(state_at(10).generator, key, labels)
  pixels = np.asarray(finished.teacher.preprocessing.to_pixels(x))
  assert picture.size == (2 * (10 * 9 - 1), 2 * (4 * 9 - 1))
  grid = np.asarray(picture)[::2, ::2].astype(int)
  for row in range(4):
    for column in range(10):
      cell = grid[9 * row : 9 * row + 9, 9 * column : 9 * column + 9]
      np.testing.assert_array_equal(cell[:8, :8], pixels[10 * row + column])
      assert (cell[8:] == 255).all()
      assert (cell[:, 8:] == 255).all()


def test_teacher_is_unchanged(finished, tiny_teacher):
  tensors, _ = weights.read_tensors(tiny_teacher)
  given = weights.unflatten(tensors)
  for held in (finished.teacher.variables, finished.variables):
    jax.tree.map(np.testing.assert_array_equal, dict(held), given)
  student, _ = weights.read_tensors(finished.workdir / 'student.safetensors')
  moved = [k for k in tensors if not np.array_equal(student[k], tensors[k])]
  assert moved == [k for k in tensors if k.startswith('params/')]


# --- The student on its own --------------------------------------------------


def test_loaded_student(finished, state_at):
  student = clusterq_jax.load_student(str(finished.workdir))
  assert student.class_names == ('ant', 'bee', 'cat', 'dog')
  assert student.preprocessing == finished.teacher.preprocessing
  assert (student.bits.weights, student.bits.placement) == (4, 'paper')
  state = state_at(10)
  trained = dict(state.student)
  trained['params'] = quantizers.settle(finished.networks.plan, trained)
  trained['quant'] = quantizers.widen(
    finished.networks.plan,
    trained['quant'],
    finished.networks.graph.last_stage,
    finished.session.config.quant.headroom,
  )
  for part in ('params', 'quant'):
    jax.tree.map(
      np.testing.assert_array_equal, student.variables[part], trained[part]
    )
  file = clusterq_jax.load_student(finished.workdir / 'student.safetensors')
  jax.tree.map(np.testing.assert_array_equal, file.variables, student.variables)


def test_weights_of_the_student_are_arguments_of_its_program(finished):
  student = clusterq_jax.load_student(finished.workdir)
  images = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3), np.uint8)
  (call,) = jax.make_jaxpr(student.logits)(images).eqns
  assert len(call.invars) == len(jax.tree.leaves(student)) + 1
  # Constants are the mean and std of the pixels.
  assert sum(np.size(c) for c in call.params['jaxpr'].consts) == 2 * 3
  np.testing.assert_allclose(
    jax.jit(lambda s, x: s.logits(x))(student, images),
    student.logits(images),
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('shape', 'dtype', 'named'),
  [
    ((2, 8, 8, 3), np.float32, 'float32'),
    ((2, 8, 8, 1), np.uint8, r'\[2, 8, 8, 1\]'),
    ((2, 9, 8, 3), np.uint8, r'\[2, 9, 8, 3\]'),
    ((8, 8, 3), np.uint8, r'\[8, 8, 3\]'),
  ],
)
def test_student_refuses_other_images(finished, shape, dtype, named):
  student = clusterq_jax.load_student(finished.workdir)
  with pytest.raises(ValueError, match=rf'{named}.*uint8 \[B, 8, 8, 3\]'):
    student.logits(np.zeros(shape, dtype))


def test_no_student(tmp_path, finished):
  with pytest.raises(InputError, match='no finished student'):
    clusterq_jax.load_student(tmp_path)
  with pytest.raises(InputError, match='teacher 2'):
    clusterq_jax.load_student(finished.config.teacher.weights)


# --- Evaluation --------------------------------------------------------------


def _npz(path, images, labels):
  np.savez(path, images=images, labels=labels)
  return str(path)


def test_evaluate(finished, workdir, answers, tiny_config, tmp_path):
  images, teacher, student = answers
  labels = student.copy()
  labels[:9] = (labels[:9] + 1) % 4  # wrong for 9 of 45: 80 % accuracy
  evaluation = tiny_config.eval
  evaluation.source = 'npz'
  evaluation.path = _npz(tmp_path / 'a.npz', images, labels)
  results = clusterq_jax.evaluate(tiny_config, str(workdir))
  assert results == _results(workdir)
  assert results['student'] == {
    'top1': 80.0,
    'n': 45,
    'agreement': round(100 * np.mean(teacher == student), 4),
  }
  assert results['teacher'] == {
    'top1': round(100 * np.mean(teacher == labels), 4)
  }
  before = finished.results
  for key in before.keys() | results.keys():
    measured = ('student', 'teacher', 'images', 'by_class')
    assert key in measured or results[key] == before[key], key
  assert results['by_class']['n'] == np.bincount(labels).tolist()
  assert sum(results['by_class']['student']) == 36

  # Evaluates only the teacher on other labels: the student's figures move to
  # `earlier`.
  labels = teacher.copy()
  labels[:18] = (labels[:18] + 1) % 4
  evaluation.path = _npz(tmp_path / 'b.npz', images, labels)
  evaluation.network = 'teacher'
  again = clusterq_jax.evaluate(tiny_config, str(workdir))
  assert again['teacher'] == {'top1': 60.0}
  # Evaluates the same images as files.
  rows = ['file,label']
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    Image.fromarray(image).save(tmp_path / f'{i}.png')
    rows.append(f'{i}.png,{label}')
  (tmp_path / 'labels.csv').write_text('\n'.join(rows))
  evaluation.source, evaluation.path = 'folder', str(tmp_path)
  evaluation.resize = 0
  files = clusterq_jax.evaluate(tiny_config, str(workdir))
  assert files['images'].pop('path') == str(tmp_path)
  assert files['images'].pop('source') == 'folder'
  assert again['images'].pop('path') == str(tmp_path / 'b.npz')
  assert again['images'].pop('source') == 'npz'
  assert files == again
  assert again['images'].keys() == {'n', 'digest'}
  assert again['student'] == {'top1': None, 'n': None, 'agreement': None}
  assert 'by_class' not in again
  (earlier,) = again.pop('earlier')
  assert earlier == {k: results[k] for k in earlier}
  assert earlier.keys() == {'images', 'teacher', 'student', 'by_class'}
  # Evaluates only the teacher on the first images, so the student's figures
  # return.
  evaluation.source, evaluation.path = 'npz', str(tmp_path / 'a.npz')
  back = clusterq_jax.evaluate(tiny_config, str(workdir))
  assert len(back.pop('earlier')) == 1
  assert back == results
  for name in ('student.safetensors', 'metrics.jsonl', 'samples.png'):
    assert (workdir / name).read_bytes() == (
      finished.workdir / name
    ).read_bytes()


def test_no_table_mixes_images(
  finished, workdir, answers, tiny_config_file, tmp_path, command
):
  images, teacher, student = answers
  flags = (
    f'--config={tiny_config_file}',
    f'--workdir={workdir}',
    '--mode=evaluate',
    '--config.eval.source=npz',
  )
  path = _npz(tmp_path / 'a.npz', images, student)
  code, out, error = command(*flags, f'--config.eval.path={path}')
  assert code == 0, error
  assert 'student top-1 ' in out
  assert f'{path} (45)' in out
  assert '\n  training time ' in out
  assert '\n  time ' not in out
  other = _npz(tmp_path / 'b.npz', images, (teacher + 1) % 4)
  code, out, error = command(
    *flags, f'--config.eval.path={other}', '--config.eval.network=teacher'
  )
  assert code == 0, error
  assert 'teacher top-1' in out
  assert '0.00 %' in out
  assert 'student top-1' not in out
  assert 'accuracies on 1 other set(s) of images' in out


def test_the_table_lists_the_files_that_are_there(
  tiny_config_file, answers, tmp_path, command
):
  images, teacher, _ = answers
  code, out, error = command(
    f'--config={tiny_config_file}',
    f'--workdir={tmp_path / "new"}',
    '--mode=evaluate',
    '--config.eval.network=teacher',
    '--config.eval.source=npz',
    f'--config.eval.path={_npz(tmp_path / "a.npz", images, teacher)}',
  )
  assert code == 0, error
  (line,) = [line for line in out.splitlines() if ' files ' in line]
  assert line.endswith(f'{tmp_path / "new"}: results.json')


def test_figures_of_before_images_had_a_digest(tmp_path):
  old = {'teacher': {'top1': 90.0}, 'student': {'top1': 89.0, 'n': 5}}
  metrics.write_json(tmp_path / 'results.json', old)
  new = {'teacher': {'top1': 10.0}, 'images': {'n': 3, 'digest': 'ab'}}
  found = workdir_lib.merge_results(tmp_path, new)
  assert found['teacher'] == {'top1': 10.0}
  assert found['student']['top1'] is None
  assert found['earlier'] == [{'images': None, **old}]


@pytest.mark.slow
def test_float64_by_default_changes_nothing(
  finished, answers, tiny_config, tmp_path
):
  images, teacher, student = answers
  expected = clusterq_jax.load_student(finished.workdir).logits(images)
  tiny_config.eval.source = 'npz'
  tiny_config.eval.path = _npz(tmp_path / 'a.npz', images, student)
  with jax.enable_x64(True):
    loaded = clusterq_jax.load_student(finished.workdir)
    logits = loaded.logits(images)
    run = shutil.copytree(finished.workdir, tmp_path / 'run')
    found = clusterq_jax.evaluate(tiny_config, str(run))
    again = clusterq_jax.quantize(tiny_config, str(tmp_path / 'again'))
  assert logits.dtype == np.float32
  np.testing.assert_array_equal(logits, expected)
  assert found['student']['top1'] == 100
  assert again['synthetic'] == finished.results['synthetic']


def test_logits_of_what_numpy_takes(finished, answers):
  student = clusterq_jax.load_student(finished.workdir)
  images = answers[0][:2]
  expected = student.logits(images)
  np.testing.assert_array_equal(student.logits(list(images)), expected)
  pictures = [Image.fromarray(image) for image in images]
  np.testing.assert_array_equal(student.logits(pictures), expected)
  np.testing.assert_array_equal(
    jax.jit(lambda s, x: s.logits(x))(student, images).argmax(-1),
    np.asarray(expected).argmax(-1),
  )
  with pytest.raises(ValueError, match=r'expected uint8 \[B, 8, 8, 3\]'):
    student.logits(pictures[0])
  with pytest.raises(ValueError, match=r'expected uint8 \[B, 8, 8, 3\]'):
    student.logits([images[0], images[1][1:]])


def test_evaluate_sees_through_the_padding(answers):
  """The padding of the last batch, 45 images in batches of 8, never counts."""
  images, _, student = answers

  def logits(batch):
    assert batch.shape == (8, 8, 8, 3)
    return np.eye(4)[np.asarray(batch).reshape(8, -1).sum(1) % 4]

  found = on_images(
    {'teacher': logits},
    data.Images(images, images.reshape(45, -1).sum(1) % 4),
    8,
  )
  assert found['teacher'] == {'top1': 100.0}
  assert found['images']['n'] == 45


def test_evaluate_needs_images(workdir, tiny_config):
  with pytest.raises(InputError, match="config.eval.source='none'"):
    clusterq_jax.evaluate(tiny_config, str(workdir))


def test_evaluate_needs_a_student(answers, tiny_config, tmp_path):
  images, teacher, _ = answers
  tiny_config.eval.source = 'npz'
  tiny_config.eval.path = _npz(tmp_path / 'a.npz', images, teacher)
  with pytest.raises(InputError, match='no finished student'):
    clusterq_jax.evaluate(tiny_config, str(tmp_path / 'nowhere'))
  assert not (tmp_path / 'nowhere').exists()


# --- Workdirs of 0.1.0 -------------------------------------------------------


@pytest.mark.parametrize('mode', ['quantize', 'evaluate', 'report'])
def test_an_old_workdir_is_refused(
  finished, tiny_config_file, command, tmp_path, mode
):
  folder = shutil.copytree(finished.workdir, tmp_path / 'run')
  stored = json.loads((folder / 'config.json').read_text())
  del stored['schema']
  (folder / 'config.json').write_text(json.dumps(stored))
  before = {f: f.stat().st_mtime_ns for f in folder.glob('[!.]*.*')}
  images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
  np.savez(tmp_path / 'a.npz', images=images, labels=labels)
  code, _, err = command(
    f'--config={tiny_config_file}',
    f'--workdir={folder}',
    f'--mode={mode}',
    '--config.eval.source=npz',
    f'--config.eval.path={tmp_path / "a.npz"}',
  )
  assert code == 2
  assert err.startswith(f'error: {folder}: config.json has schema None')
  assert len(err.strip().splitlines()) == 1
  assert {f: f.stat().st_mtime_ns for f in folder.glob('[!.]*.*')} == before
  # Its student still loads, by the name of its network.
  assert clusterq_jax.load_student(folder).bits.weights == 4
