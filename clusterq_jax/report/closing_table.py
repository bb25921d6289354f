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


def _percent(value: float | None) -> str:
  return 'no real images given' if value is None else f'{value:.2f} %'


def closing_table(
  results: dict[str, Any], config: ml_collections.ConfigDict, workdir: str
) -> str:
  """The rows of `closing_rows`, aligned."""
  return '\n' + metrics.table(closing_rows(results, config, workdir))


def closing_rows(
  results: dict[str, Any], config: ml_collections.ConfigDict, workdir: str
) -> list[tuple[str, str]]:
  """What the user cares about, and where the files are.

  Args:
    results: as in results.json, or what `html_report.write` made of it.
    config: of the run.
    workdir: of the run.

  Returns:
    Names and values; the name '' goes on with the row before.
  """
  if 'unfinished' in results:
    rest = 'the same command with --mode=quantize goes on from there'
    return [
      ('not finished', f'{results["unfinished"]}; {rest}'),
      *_reported(results, workdir),
    ]
  teacher, student = results.get('teacher', {}), results.get('student', {})
  rows = []
  if results.get('images'):
    rows.append(('images', _images(results['images'])))
  rows.append(('teacher top-1', _percent(teacher.get('top1'))))
  top1 = student.get('top1')
  if top1 is not None and teacher.get('top1') is not None:
    rows += [
      (
        'student top-1',
        f'{top1:.2f} % ({top1 - teacher["top1"]:+.2f}, {student["n"]} images)',
      ),
      ('agreement with teacher', _percent(student.get('agreement'))),
    ]
  deployed = results.get('deployed', {})
  if deployed.get('top1') is not None:
    rows.append(
      (
        'deployed top-1',
        f'{deployed["top1"]:.2f} % (agrees with the student on '
        f'{deployed["agreement"]:.2f} % of {deployed["n"]} images)',
      )
    )
  if results.get('earlier'):
    rows.append(
      (
        'on other images',
        f'results.json, `earlier`: figures on {len(results["earlier"])} other '
        'set(s) of images',
      )
    )
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
    bits, size = results['bits'], results['size']
    before, after = size['teacher_bytes'], size['student_bytes']
    rows += [
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
        f'{results["wall_s"]:.0f} s, of which compilation '
        f'{results["compile_s"]:.0f} s; peak memory '
        f'{results["peak_rss_mb"] / 1e3:.1f} GB',
      ),
    ]
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


def _images(images: dict[str, Any]) -> str:
  name = images['path'] or images['source']
  return f'{name} ({images["n"]:,})'


def _present(workdir: str, finished: bool) -> list[str]:
  """Those of a run's files that are there; in a bucket, that should be."""
  if '://' in workdir:
    return list(_FILES) if finished else ['results.json']
  folder = pathlib.Path(workdir)
  return [name for name in _FILES if (folder / name).exists()]


def _reported(results: dict[str, Any], workdir: str) -> list[tuple[str, str]]:
  """What --mode=report has written."""
  if 'report' not in results:
    return []
  rows = [('report', f'{workdir}/report.html')]
  if results['report']['events']:
    rows.append(('for TensorBoard', f'tensorboard --logdir={workdir}'))
  else:
    rows.append(('for TensorBoard', 'nothing yet: pip install tensorboardX'))
  return rows


def _forecast(drop: dict[str, float] | None) -> str:
  count = len(forecast.coefficients()['networks'])
  if drop is None:
    return (
      'none: further from the teacher than any student of the '
      f'{count} networks it was fitted on'
    )
  return (
    f'{drop["drop"]:.1f} points, {drop["low"]:.1f} to {drop["high"]:.1f} for 9 '
    f'of 10 networks like the {count} it was fitted on: a hint, no measurement'
  )


def _exported(export: dict[str, Any]) -> list[tuple[str, str]]:
  sizes = export['bytes']
  small, large = sizes['integer.onnx'], sizes['float32.onnx']
  return [
    (
      'exported',
      f'integer.onnx {small / 1e6:.2f} MB, float32.onnx {large / 1e6:.2f} MB '
      f'(x{large / small:.1f})',
    ),
    ('', f'{export["folder"]}: {", ".join(sizes)}'),
    ('check a machine', f'python {export["folder"]}/selftest.py'),
  ]
