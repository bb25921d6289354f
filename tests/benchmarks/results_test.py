"""The page of results: equal to what the records say, and each record valid."""

import re

import numpy as np
import pytest

from benchmarks import records

jinja2 = pytest.importorskip('jinja2')

from benchmarks import results, results_format, results_studies  # noqa: E402

_STALE = 'differs from the records: run python -m benchmarks.results'


def _charts():
  pytest.importorskip('matplotlib')
  from benchmarks import results_charts

  return results_charts


def _texts(svg):
  return sorted(re.findall(r'<text[^>]*>(.*?)</text>', svg, re.DOTALL))


def _numbers(svg):
  """All coordinates of what is drawn: of paths, and of marks along them."""
  paths = re.findall(r'<path[^>]* d="([^"]*)"', svg)
  marks = re.findall(r'<use[^>]* x="([^"]*)" y="([^"]*)"', svg)
  text = ' '.join([*paths, *(' '.join(mark) for mark in marks)])
  return np.array(re.findall(r'-?\d+\.?\d*', text), float)


@pytest.mark.parametrize('name', records.names())
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
  assert text == results.with_part(text, results.readme_part()), (
    f'README.md {_STALE}'
  )


def test_readme_without_marks():
  with pytest.raises(ValueError, match='once each'):
    results.with_part('no marks', 'table')
  with pytest.raises(ValueError, match='stands before'):
    results.with_part('<!-- /results --> <!-- results -->', 'table')


def test_charts_are_of_the_records():
  charts = _charts()
  files = {file.stem for file in results.DOCS.glob('*.svg')}
  assert files == charts.CHARTS.keys()
  for name in charts.CHARTS:
    svg = (results.DOCS / f'{name}.svg').read_text()
    assert records.digest(charts.shown(name)) in svg, f'{name}.svg {_STALE}'


def test_charts_are_drawn_as_now():
  charts = _charts()
  for name in charts.CHARTS:
    old = (results.DOCS / f'{name}.svg').read_text()
    new = charts.draw(name).decode()
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
  _forget()
  try:
    assert results.PAGE.read_text() != results.page()
    readme = results.README.read_text()
    changed = readme != results.with_part(readme, results.readme_part())
    assert changed == (name == 'accuracy')
  finally:
    _forget()


def _forget():
  """Forgets the records that were read."""
  results_studies.ablated.cache_clear()
  results_studies._forecasts.cache_clear()


@pytest.mark.parametrize(
  ('value', 'form', 'text'),
  [
    (None, '.2f', '–'),
    ('never', '.2f', 'never'),
    (1234, ',d s', '1,234 s'),
    ([2.0, 1.0, 3.0], '.1f ×', '2.0 × (1.0 to 3.0)'),
  ],
)
def test_figure(value, form, text):
  assert results_format.figure(value, form) == text
