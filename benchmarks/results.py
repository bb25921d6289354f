"""Writes docs/results.md, its charts, and the table of results in README.md.

    python -m benchmarks.results

All figures come from the records in benchmarks/records. The text between them
is in results.md.j2. tests/benchmarks/results_test.py fails where the written
files differ from the records.
"""

import pathlib
import sys
import textwrap
from typing import Any

import jinja2

from benchmarks import (
  records,
  results_accuracy,
  results_plain,
  results_studies,
)
from benchmarks.results_format import NETWORKS, count, grid

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent
DOCS = ROOT / 'docs'
PAGE = DOCS / 'results.md'
README = ROOT / 'README.md'
MARKS = '<!-- results -->', '<!-- /results -->'
_LEAST = 0.3  # points: the forecast's factor is of drops from here on


def _name(key: str) -> str:
  """Names network and bits of a key such as 'cifar100_variant W4A4'."""
  config, bits = key.split()
  return f'{NETWORKS[config]}, {bits}'


def _trial(group: str) -> records.Record:
  return records.only('trials', group=group)


def values() -> dict[str, Any]:
  """Collects what the template of the page can name."""
  integer = {
    name: records.only('integer', group=group)
    for name, group in (
      ('plain_onnx', 'no_optimizations'),
      ('openvino', 'openvino_latency'),
      ('openvino_loss', 'openvino_accuracy'),
    )
  }
  lite = records.read('accuracy', config='efficientnet_lite0')
  return {
    **integer,
    'count': count,
    'name': _name,
    'table': results_plain.table,
    'accuracy': results_accuracy.accuracy(),
    'placements': results_accuracy.repeated(),
    'lite_images': lite[0]['images'],
    'lite_agreement': next(r['agreement'] for r in lite if r['bits'] == 'W8A8'),
    'steps_at_most': records.read('published', group='drop')[0][
      'steps_at_most'
    ],
    'time': results_studies.time_to_accuracy(),
    'ablation': results_studies.ablation,
    'same_student': records.read('time_to_accuracy', method='recipe')[0],
    'other_student': records.only(
      'accuracy',
      config='cifar10_resnet20_fast',
      bits='W4A4',
      placement='paper',
      seed=0,
    ),
    'terms': results_studies.class_term_facts(),
    'pairs': results_studies.pairs,
    'moved': results_studies.pair_facts('moved_images'),
    'moved_cost': _trial('moved_images'),
    'easy': _trial('easy_images'),
    'blended': results_studies.pair_facts('blended_images'),
    'blended_mean': {
      r['with']: r['drop']
      for r in records.read('pairs', group='blended_images_mean')
    },
    'forecast': results_studies.forecast(),
    'forecast_least': _LEAST,
    'forecast_facts': results_studies.forecast_facts(_LEAST),
    'torch_batch': records.read('step_time', group='pytorch')[0]['batch'],
    'torch_earlier': records.only('step_time', group='pytorch_earlier'),
    'steady': records.only('scaling', group='steady_checkpoints'),
  }


def _filled(text: str) -> str:
  """Wraps prose and lists at 88 columns; leaves headings, tables and code."""
  parts = []
  for part in text.strip().split('\n\n'):
    part = part.strip('\n')
    if part.startswith('- '):
      items = part.removeprefix('- ').split('\n- ')
      lines = (
        textwrap.fill(' '.join(item.split()), 86, subsequent_indent='  ')
        for item in items
      )
      part = '\n'.join(f'- {line}' for line in lines)
    elif part[0] not in '#|!<':
      part = textwrap.fill(' '.join(part.split()), 88, break_on_hyphens=False)
    parts.append(part)
  return '\n\n'.join(parts) + '\n'


def page() -> str:
  """Makes the text of docs/results.md."""
  loader = jinja2.FileSystemLoader(FOLDER)
  environment = jinja2.Environment(
    loader=loader,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
  )
  return _filled(environment.get_template('results.md.j2').render(values()))


def readme_part() -> str:
  """Makes what stands between the marks in README.md."""
  table = results_accuracy.readme()
  whole = '; '.join(
    f'{w["name"]} {w["time"]}' for w in results_accuracy.whole_times()
  )
  legend = (
    'Figures are means over the seeds. Size and speed are against float32. '
    'Speed is that of ONNX Runtime for one image on one thread. A dash means '
    'that nothing is recorded. `integer` placement quantizes every tensor; '
    '`paper` leaves residual adds in float. A time with a plus sign is that of '
    'the student alone, which starts from the generator of a finished run. '
    f'Whole W4A4 runs with `paper` placement: {whole}. '
    '[docs/results.md](docs/results.md) has every seed, machine and command.'
  )
  text = textwrap.fill(legend, 88, break_on_hyphens=False)
  return f'{grid(table.heads, table.rows)}\n\n{text}'


def with_part(readme: str, part: str) -> str:
  """Puts a text between the marks of README.md.

  Args:
    readme: the whole text.
    part: to stand between the marks.

  Returns:
    The new text.

  Raises:
    ValueError: the marks are not there, each once and in order.
  """
  start, stop = MARKS
  if readme.count(start) != 1 or readme.count(stop) != 1:
    raise ValueError(f'README.md: expected {start} and {stop}, once each')
  head, rest = readme.split(start)
  if stop not in rest:
    raise ValueError(f'README.md: {stop} stands before {start}')
  tail = rest.split(stop)[1]
  return f'{head}{start}\n\n{part}\n\n{stop}{tail}'


def main() -> int:
  # Tests read the tables of this module where matplotlib is not installed.
  from benchmarks import results_charts

  DOCS.mkdir(exist_ok=True)
  PAGE.write_text(page())
  README.write_text(with_part(README.read_text(), readme_part()))
  for name in results_charts.CHARTS:
    (DOCS / f'{name}.svg').write_bytes(results_charts.draw(name))
  print(f'wrote {PAGE}, {README} and {len(results_charts.CHARTS)} charts')
  return 0


if __name__ == '__main__':
  sys.exit(main())
