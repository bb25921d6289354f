"""The closing table: which rows a run gets."""

import ml_collections
import pytest

from clusterq_jax.report import closing_table

_RESULTS = {
  'images': {'source': 'npz', 'path': 'a.npz', 'n': 1200},
  'teacher': {'top1': 93.5},
  'student': {'top1': 92.25, 'n': 1200, 'agreement': 97.0},
  'deployed': {'top1': 92.0, 'n': 1200, 'agreement': 99.5},
  'synthetic': {'agreement': 100.0, 'n': 64},
  'bits': {
    'weights': 4,
    'activations': 4,
    'first': 8,
    'last': 8,
    'placement': 'integer',
  },
  'size': {'teacher_bytes': 4_000_000, 'student_bytes': 1_000_000},
  'wall_s': 100.4,
  'compile_s': 60.0,
  'peak_rss_mb': 1500.0,
  'earlier': [{}],
  'export': {
    'folder': 'runs/a/export',
    'bytes': {'float32.onnx': 4_000_000, 'integer.onnx': 1_000_000},
  },
  'report': {'events': False},
}


@pytest.fixture
def config():
  return ml_collections.ConfigDict({'eval': {'source': 'npz'}})


def test_rows_of_a_finished_run(config, tmp_path):
  (tmp_path / 'results.json').touch()
  rows = closing_table.closing_rows(_RESULTS, config, str(tmp_path))
  assert rows == [
    ('images', 'a.npz (1,200)'),
    ('teacher top-1', '93.50 %'),
    ('student top-1', '92.25 % (-1.25 points, 1200 images)'),
    ('agreement with teacher', '97.00 %'),
    (
      'integer file top-1',
      '92.00 % (same class as the student on 99.50 % of 1200 images)',
    ),
    (
      'on other images',
      '`earlier` in results.json holds the accuracies on 1 other set(s) of '
      'images',
    ),
    ('agreement on synthetic images', '100.00 % (64 images)'),
    ('bits', 'W4A4, first and last weights 8 and 8, integer placement'),
    ('weights', '4.00 MB float32 -> 1.00 MB (x4.0 smaller)'),
    (
      'training time',
      '100 s, including 60 s of compilation; peak memory 1.5 GB',
    ),
    ('files', f'{tmp_path}: results.json'),
    (
      'integer file',
      'runs/a/export/integer.onnx: 1.00 MB, x4.0 smaller than float32.onnx',
    ),
    ('beside it', 'float32.onnx'),
    (
      'check a machine',
      'pip install onnxruntime; python runs/a/export/selftest.py',
    ),
    ('run it', 'onnxruntime.InferenceSession(...), see docs/deploy.md'),
    ('report', f'{tmp_path}/report.html'),
    ('for TensorBoard', 'no event file: pip install tensorboardX'),
  ]


def test_without_real_images(config, tmp_path):
  config.eval.source = 'none'
  rows = closing_table.closing_rows({}, config, str(tmp_path))
  assert rows == [
    ('teacher top-1', 'no real images given'),
    (
      'real accuracy',
      '--mode=evaluate --config.eval.source=npz --config.eval.path=FILE',
    ),
  ]


def test_an_unfinished_run(config):
  results = {**_RESULTS, 'unfinished': 'step 3 of 10'}
  results['report'] = {'events': True}
  assert closing_table.closing_rows(results, config, 'a') == [
    (
      'not finished',
      'step 3 of 10; the same command with --mode=quantize resumes the run',
    ),
    ('report', 'a/report.html'),
    ('for TensorBoard', 'tensorboard --logdir=a'),
  ]


def test_files_of_a_bucket_are_those_expected(config):
  rows = dict(closing_table.closing_rows(_RESULTS, config, 'gs://a/b'))
  assert rows['files'].startswith('gs://a/b: student.safetensors, results.json')
  rows = dict(closing_table.closing_rows({}, config, 'gs://a/b'))
  assert rows['files'] == 'gs://a/b: results.json'


def test_columns_are_aligned(config):
  lines = closing_table.closing_table(_RESULTS, config, 'a').splitlines()
  assert lines[0] == ''
  width = len('agreement on synthetic images')
  assert f'  {"bits":<{width}}  W4A4' in lines[8]
