"""The charts: valid SVG, the same every time, apart from each other."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from clusterq_jax.report import figures

_XLINK = '{http://www.w3.org/1999/xlink}href'
_HOSTILE = '</svg><script>"&\' $x^2$'


def _curves(title='Loss', **kwargs):
  x = [1, 2, 3, 4]
  lines = [figures.Curve('a', x, [4, 3, 2, 1]), figures.Curve('b', x, [1] * 4)]
  return figures.curves(title, lines, 'step', 'loss, nats', **kwargs)


def _scatter(title='Map'):
  points = np.array([[0.0, 0], [1, 1], [2, 0], [3, 1]])
  groups = np.array([3, 3, 7, 7])
  return figures.scatter(title, points, groups, points.min(0), points.max(0))


def _heat_map(title='Distances'):
  values = np.array([[0, 1.25, 12.4], [1.25, 0, 4], [12.4, 4, 0]])
  return figures.heat_map(title, values, 12.4, np.array([0, 4, 9]))


_ALL = pytest.mark.parametrize('draw', [_curves, _scatter, _heat_map])


def _parse(svg):
  """Parses a chart; inside HTML it needs no declaration of its prefix."""
  declared = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
  return ET.fromstring(svg.replace('<svg', f'<svg {declared}', 1))


def _texts(svg):
  return [element.text for element in _parse(svg).iter('text')]


def _identifiers(svg):
  return [e.get('id') for e in _parse(svg).iter() if e.get('id')]


@_ALL
def test_a_chart_is_the_same_every_time(draw):
  before = draw()
  assert draw() == before
  # Whatever a matplotlibrc on this machine sets.
  with matplotlib.rc_context({'font.size': 30, 'figure.facecolor': 'red'}):
    assert draw() == before


@_ALL
def test_a_chart_fits_into_a_page(draw):
  svg = draw()
  assert svg.startswith('<svg ')
  assert 'http' not in svg
  assert '<style' not in svg  # it would apply to the whole page
  assert '<image' not in svg
  identifiers = _identifiers(svg)
  assert identifiers
  assert len(set(identifiers)) == len(identifiers)
  used = [e.get(_XLINK) for e in _parse(svg).iter('use')]
  used += [f'#{name}' for name in re.findall(r'url\(#(\w+)\)', svg)]
  assert {name[1:] for name in used} == set(identifiers)


@_ALL
def test_charts_of_different_titles_share_no_identifier(draw):
  assert not {*_identifiers(draw('A'))} & {*_identifiers(draw('B'))}


@_ALL
def test_titles_stay_text(draw):
  svg = draw(_HOSTILE)
  assert _parse(svg).get('aria-label') == _HOSTILE
  assert _HOSTILE in _texts(svg)
  assert svg.count('<svg') == svg.count('</svg>') == 1


def test_curves_name_axes_and_lines():
  texts = _texts(_curves())
  assert {'Loss', 'step', 'loss, nats', 'a', 'b'} <= set(texts)
  # Each named curve is drawn twice: in the chart and in the legend.
  for color, *_ in figures._CURVES[:2]:
    assert len(re.findall(rf'fill: none;.* stroke: {color}', _curves())) == 2
  svg = figures.curves('Loss', [figures.Curve('', [1], [1])], 'step', 'nats')
  assert svg.count(f'fill: none; stroke: {figures._CURVES[0][0]}') == 1


def test_marks_outside_the_data_are_left_out():
  marks = [(1, 'first'), (2, 'second'), (2.1, 'third'), (4, 'last')]
  svg = _curves(marks=marks)
  assert {'second', 'third'} <= set(_texts(svg))
  assert not {'first', 'last'} & set(_texts(svg))
  # Names that would overlap stand in two rows.
  heights = [
    float(element.get('y'))
    for element in _parse(svg).iter('text')
    if element.text in ('second', 'third')
  ]
  assert heights[0] - heights[1] >= 7


@pytest.mark.parametrize('high', [30.0, 1e5])
def test_log_ticks_are_plain_numbers(high):
  line = figures.Curve('', [1, 2, 3], [0.1, 1.0, high])
  texts = _texts(figures.curves('Loss', [line], 'step', 'nats', log=True))
  # How many decades a tick spans depends on the version of matplotlib.
  assert {'1', '10'} <= set(texts) or {'1', '100'} <= set(texts)
  assert not any('$' in text for text in texts)


def test_a_missing_value_is_skipped():
  def path(y):
    line = figures.Curve('', range(len(y)), y)
    svg = figures.curves('Loss', [line], 'step', 'nats')
    color = figures._CURVES[0][0]
    (found,) = re.findall(rf'd="([^"]*)"[^>]*fill: none; stroke: {color}', svg)
    return found.count('M'), found.count('L')

  assert path([1, 2, 3, 4]) == (1, 3)
  assert path([1, np.nan, 3, 4]) == (1, 2)


def test_scatter_shows_each_point_in_the_colour_of_its_class():
  svg = _scatter()
  for group in 3, 7:
    assert str(group) in _texts(svg)
    assert len(re.findall(rf'<use [^>]*{figures.CLASSES[group]}', svg)) == 2


def test_heat_map_writes_the_values():
  svg = _heat_map()
  texts = _texts(svg)
  for name in '0', '4', '9':
    assert texts.count(name) == 2
  for value in '1.2', '12', '4.0':
    assert texts.count(value) == 2
  assert '0.0' not in texts  # the diagonal
  # White on the darkest cell alone.
  white = re.findall(r'fill: #ffffff"[^>]*>([^<]*)</text>', svg)
  assert white == ['12', '12']
