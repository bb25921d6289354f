"""The table that every mode prints at its end."""

import pathlib
from typing import Any

import ml_collections

from clusterq_jax.runtime import forecast, metrics

_FILES = (
  'student.safetensors',
  'results.json',
  'samples.png',
  'metrics.jsonl',
  'checkpoints/',
)


_Rows = list[tuple[str, str]]


def closing_table(
  results: dict[str, Any], config: ml_collections.ConfigDict, workdir: str
) -> str:
  """Returns the rows of `closing_rows` as aligned text.

  Args:
    results: content of results.json.
    config: config of the run.
    workdir: folder or URL of the run.
  """
  return '\n' + metrics.table(closing_rows(results, config, workdir))


def closing_rows(
  results: dict[str, Any], config: ml_collections.ConfigDict, workdir: str
) -> _Rows:
  """Lists the main results of a run and where its files are.

  Args:
    results: content of results.json, or what `modes.report.report` returns.
    config: config of the run.
    workdir: folder or URL of the run.

  Returns:
    Names and values. A row with the name '' continues the row before it.
  """
  if 'unfinished' in results:
    rest = 'the same command with --mode=quantize resumes the run'
    return [
      ('not finished', f'{results["unfinished"]}; {rest}'),
      *_reported(results, workdir),
    ]
  rows = _accuracies(results)
  if 'synthetic' in results:
    synthetic = results['synthetic']
    rows.append(
      (
        'agreement on synthetic images',
        f'{synthetic["agreement"]:.2f} % ({synthetic["n"]} images)',
      )
    )
  if 'forecast' in results:
    rows.append(('forecast of the drop', _forecast(results['forecast'])))
  if 'bits' in results:
    rows += _cost(results)
  files = _present(workdir, finished='bits' in results)
  if files:
    rows.append(('files', f'{workdir}: {", ".join(files)}'))
  if 'export' in results:
    rows += _exported(results['export'])
  rows += _reported(results, workdir)
  if config.eval.source == 'none':
    rows.append(
      (
        'real accuracy',
        '--mode=evaluate --config.eval.source=npz --config.eval.path=FILE',
      )
    )
  return rows


def _percent(value: float | None) -> str:
  return 'no real images given' if value is None else f'{value:.2f} %'


def _accuracies(results: dict[str, Any]) -> _Rows:
  """Lists the accuracies on real images."""
  teacher, student = results.get('teacher', {}), results.get('student', {})
  rows = []
  if images := results.get('images'):
    name = images['path'] or images['source']
    rows.append(('images', f'{name} ({images["n"]:,})'))
  rows.append(('teacher top-1', _percent(teacher.get('top1'))))
  top1 = student.get('top1')
  if top1 is not None and teacher.get('top1') is not None:
    rows += [
      (
        'student top-1',
        f'{top1:.2f} % ({top1 - teacher["top1"]:+.2f} points, '
        f'{student["n"]} images)',
      ),
      ('agreement with teacher', _percent(student.get('agreement'))),
    ]
  deployed = results.get('deployed', {})
  if deployed.get('top1') is not None:
    rows.append(
      (
        'integer file top-1',
        f'{deployed["top1"]:.2f} % (same class as the student on '
        f'{deployed["agreement"]:.2f} % of {deployed["n"]} images)',
      )
    )
  if results.get('earlier'):
    rows.append(
      (
        'on other images',
        '`earlier` in results.json holds the accuracies on '
        f'{len(results["earlier"])} other set(s) of images',
      )
    )
  return rows


def _cost(results: dict[str, Any]) -> _Rows:
  """Lists bit widths, sizes, time and memory."""
  bits, size = results['bits'], results['size']
  before, after = size['teacher_bytes'], size['student_bytes']
  return [
    (
      'bits',
      f'W{bits["weights"]}A{bits["activations"]}, first and last weights '
      f'{bits["first"]} and {bits["last"]}, {bits["placement"]} placement',
    ),
    (
      'weights',
      f'{before / 1e6:.2f} MB float32 -> {after / 1e6:.2f} MB '
      f'(x{before / after:.1f} smaller)',
    ),
    (
      'training time',
      f'{results["wall_s"]:.0f} s, including {results["compile_s"]:.0f} s of '
      f'compilation; peak memory {results["peak_rss_mb"] / 1e3:.1f} GB',
    ),
  ]


def _present(workdir: str, finished: bool) -> list[str]:
  """Returns the files of a run that exist; in a bucket, the expected ones."""
  if '://' in workdir:
    return list(_FILES) if finished else ['results.json']
  folder = pathlib.Path(workdir)
  return [name for name in _FILES if (folder / name).exists()]


def _reported(results: dict[str, Any], workdir: str) -> _Rows:
  """Lists what --mode=report has written."""
  if 'report' not in results:
    return []
  rows = [('report', f'{workdir}/report.html')]
  if results['report']['events']:
    rows.append(('for TensorBoard', f'tensorboard --logdir={workdir}'))
  else:
    rows.append(('for TensorBoard', 'no event file: pip install tensorboardX'))
  return rows


def _forecast(drop: dict[str, Any] | None) -> str:
  count = len(forecast.coefficients()['networks'])
  if drop is None:
    return (
      'none: the student is further from the teacher than any student of the '
      f'{count} networks in the fit'
    )
  unlike = ', '.join(drop.get('unlike', ()))
  return (
    f'{drop["drop"]:.1f} points, {drop["low"]:.1f} to {drop["high"]:.1f} for 9 '
    f'of 10 networks like the {count} in the fit; an estimate, not a '
    'measurement'
    + (f'. This network is unlike them: {unlike}' if unlike else '')
  )


def _exported(export: dict[str, Any]) -> _Rows:
  """Lists the deployable files and how to use them."""
  sizes = export['bytes']
  small, large = sizes['integer.onnx'], sizes['float32.onnx']
  return [
    (
      'integer file',
      f'{export["folder"]}/integer.onnx: {small / 1e6:.2f} MB, x'
      f'{large / small:.1f} smaller than float32.onnx',
    ),
    ('beside it', ', '.join(name for name in sizes if name != 'integer.onnx')),
    (
      'check a machine',
      f'pip install onnxruntime; python {export["folder"]}/selftest.py',
    ),
    ('run it', 'onnxruntime.InferenceSession(...), see docs/deploy.md'),
  ]
