"""The page of results: equal to what the records say, and each record valid."""

import re

import numpy as np
import pytest

from benchmarks import records

jinja2 = pytest.importorskip('jinja2')

from benchmarks import results, results_tables  # noqa: E402

_STALE = 'differs from the records: run python -m benchmarks.results'


def _charts():
  pytest.importorskip('matplotlib')
  from benchmarks import results_charts

  return results_charts


def _digest(svg):
  return re.search('records sha256 [0-9a-f]{64}', svg)[0]


def _texts(svg):
  return sorted(re.findall(r'<text[^>]*>(.*?)</text>', svg, re.DOTALL))


def _numbers(svg):
  """All coordinates of what is drawn: of paths, and of marks along them."""
  paths = re.findall(r'<path[^>]* d="([^"]*)"', svg)
  marks = re.findall(r'<use[^>]* x="([^"]*)" y="([^"]*)"', svg)
  text = ' '.join([*paths, *(' '.join(mark) for mark in marks)])
  return np.array(re.findall(r'-?\d+\.?\d*', text), float)


_FILES = sorted(file.stem for file in records.FOLDER.glob('*.jsonl'))


@pytest.mark.parametrize('name', _FILES)
def test_records_are_valid(name):
  found = {i: records.problems(r) for i, r in enumerate(records.read(name), 1)}
  assert {line: lacks for line, lacks in found.items() if lacks} == {}


@pytest.mark.parametrize(
  ('change', 'problem'),
  [
    ({'kind': 'guessed'}, 'kind'),
    ({'commit': None}, 'commit'),
    ({'commit': ''}, 'commit'),
    ({'machine': None}, 'machine'),
    ({'kind': 'quoted'}, 'work'),
  ],
)
def test_records_that_are_not_valid(change, problem):
  sound = {'kind': 'measured', 'commit': 'abc', 'machine': {'cpu': 'Xeon'}}
  assert records.problems(sound) == []
  (found,) = records.problems(sound | change)
  assert problem in found


def test_page():
  assert results.PAGE.read_text() == results.page(), f'{results.PAGE} {_STALE}'


def test_readme():
  text = results.README.read_text()
  assert text == results.with_parts(text), f'README.md {_STALE}'


def test_readme_without_marks():
  with pytest.raises(ValueError, match='once each'):
    results.with_parts('no marks')
  with pytest.raises(ValueError, match='stands before'):
    results.with_parts('<!-- /quickstart --> <!-- quickstart -->')


def test_charts():
  charts = _charts()
  drawn = results.DOCS.glob('*.svg')
  files = {file.stem for file in drawn} - {'path'}  # not a chart
  assert files == charts.CHARTS.keys()
  for name in charts.CHARTS:
    old = (results.DOCS / f'{name}.svg').read_text()
    new = charts.draw(name).decode()
    assert _digest(old) == _digest(new), f'{name}.svg {_STALE}'
    assert _texts(old) == _texts(new), f'{name}.svg {_STALE}'
    # Another version may place the same things elsewhere.
    if charts.matplotlib.__version__ in old:
      np.testing.assert_allclose(_numbers(old), _numbers(new), atol=0.1)


@pytest.mark.parametrize(
  ('name', 'old', 'new'),
  [
    ('accuracy', '"student": 92.95', '"student": 91.95'),
    ('time_to_accuracy', '"end_s": 901', '"end_s": 902'),
    ('scaling', '"mb": 838', '"mb": 839'),
    ('trials', '"value": 0.96', '"value": 0.97'),
    ('ablation', '0.0733]', '0.0833]'),
  ],
)
def test_page_follows_the_records(monkeypatch, tmp_path, name, old, new):
  for file in records.FOLDER.glob('*.jsonl'):
    text = file.read_text()
    if file.stem == name:
      assert old in text
      text = text.replace(old, new, 1)
    (tmp_path / file.name).write_text(text)
  monkeypatch.setattr(records, 'FOLDER', tmp_path)
  assert results.PAGE.read_text() != results.page()
  readme = results.README.read_text()
  assert (readme != results.with_parts(readme)) == (name == 'accuracy')


@pytest.mark.parametrize(
  ('value', 'form', 'text'),
  [
    (None, '{x:.2f}', '–'),
    ('never', '{x}', 'never'),
    (1234, '{x:,} s', '1,234 s'),
    ([2.0, 1.0, 3.0], '{x:.1f}', '2.0 (1.0 to 3.0)'),
    ([2.0, 3.0], '{x:g}', '2 to 3'),
    ([2.0, 2.0], '{x:g}', '2'),
    (results_tables.Seeds([1.0, 2.0]), '{x:.2f}', '1.50 (1.00, 2.00)'),
    (results_tables.Seeds([1.0]), '{x:.2f}', '1.00'),
  ],
)
def test_cell(value, form, text):
  assert results_tables.cell({'x': value}, form) == text


def test_a_column_of_no_row():
  with pytest.raises(KeyError):
    results_tables.grid([{'x': 1}, {'y': 2}], {'head': '{z}'})
  table = results_tables.grid([{'x': 1}, {'y': 2}], {'head': '{x}'})
  assert table.splitlines()[2:] == ['| 1 |', '| – |']


def test_pivot():
  runs = [
    {'a': a, 'with': w, 'drop': drop}
    for a, w, drop in ((1, True, 2.0), (1, False, 3.0), (1, True, 4.0))
  ]
  (row,) = results_tables.pivot(runs, 'a', over='with')
  assert row['drop_True'] == [2.0, 4.0]
  assert row['drop_False'] == [3.0]
  assert row['records'] == runs


def test_append_refuses_what_is_not_valid(tmp_path):
  file = tmp_path / 'new.jsonl'
  with pytest.raises(ValueError, match='commit'):
    records.append(file, {'kind': 'computed'})
  records.append(file, {'kind': 'computed', 'commit': 'abc'})
  assert records.lines(file) == [{'kind': 'computed', 'commit': 'abc'}]
