"""Writes docs/results.md, its charts, and the generated parts of README.md.

    python -m benchmarks.results

All figures come from the records in benchmarks/records. The templates
results*.md.j2 hold the text and the columns of the tables.
tests/benchmarks/results_test.py fails where the written files differ from the
records.
"""

import pathlib
import statistics
import sys

import jinja2

from benchmarks import common, records, results_rows, results_tables

DOCS = common.ROOT / 'docs'
PAGE = DOCS / 'results.md'
README = common.ROOT / 'README.md'
# Parts of README.md, between <!-- PART --> and <!-- /PART -->.
PARTS = {
  'quickstart': 'results_quickstart.md.j2',
  'results': 'results_readme.md.j2',
}


def render(template: str) -> str:
  """Fills in a template of this folder."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    autoescape=False,
  )
  return environment.get_template(template).render(
    read=records.read,
    only=records.only,
    grid=results_tables.grid,
    table=results_tables.table,
    rows=results_rows,
    mean=statistics.mean,
  )


def page() -> str:
  """Makes the text of docs/results.md."""
  return render('results.md.j2')


def with_parts(readme: str) -> str:
  """Puts the generated parts between their marks.

  Args:
    readme: the whole text of README.md.

  Returns:
    The new text.

  Raises:
    ValueError: a mark is not there once, or the two are not in order.
  """
  for part, template in PARTS.items():
    start, stop = f'<!-- {part} -->', f'<!-- /{part} -->'
    if readme.count(start) != 1 or readme.count(stop) != 1:
      raise ValueError(f'README.md: expected {start} and {stop}, once each')
    head, rest = readme.split(start)
    if stop not in rest:
      raise ValueError(f'README.md: {stop} stands before {start}')
    text = render(template).strip('\n')
    readme = f'{head}{start}\n\n{text}\n\n{stop}{rest.split(stop)[1]}'
  return readme


def main() -> int:
  # Tests read the tables of this module where matplotlib is not installed.
  from benchmarks import results_charts

  PAGE.write_text(page())
  README.write_text(with_parts(README.read_text()))
  for name in results_charts.CHARTS:
    (DOCS / f'{name}.svg').write_bytes(results_charts.draw(name))
  print(f'wrote {PAGE}, {README} and {len(results_charts.CHARTS)} charts')
  return 0


if __name__ == '__main__':
  sys.exit(main())
