"""Tests the forecast, its interval and the fit of its coefficients."""

import json

import ml_collections
import pytest

from benchmarks import forecast as fitting
from clusterq_jax.models import graph as graph_lib
from clusterq_jax.models import registry
from clusterq_jax.models.graph import trace
from clusterq_jax.models.node import Node
from clusterq_jax.report import closing_table as report
from clusterq_jax.runtime import forecast


@pytest.fixture
def coefficients(monkeypatch, tmp_path):
  file = tmp_path / 'forecast.json'
  monkeypatch.setattr(forecast, 'FILE', file)
  values = {'slope': 20.0, 'factor': 2.0, 'margin': 0.25}
  values |= {'largest_divergence': 0.2, 'networks': {'a': 3, 'b': 3, 'c': 2}}
  file.write_text(json.dumps(values))
  return values


def test_drop(coefficients):
  assert forecast.drop(0.04) == {'drop': 0.8, 'low': 0.35, 'high': 1.65}
  assert forecast.drop(0.16) == {'drop': 3.2, 'low': 1.5, 'high': 6.5}
  assert forecast.drop(0.0) == {'drop': 0.0, 'low': 0.0, 'high': 0.0}


@pytest.mark.parametrize('divergence', [0.21, float('inf'), float('nan')])
def test_none_beyond_what_it_was_fitted_on(coefficients, divergence):
  assert forecast.drop(divergence) is None


def test_the_one_in_the_package():
  c = forecast.coefficients()
  assert len(c['networks']) >= 3
  assert c['factor'] > 1
  assert c['margin'] > 0
  assert forecast.drop(c['largest_divergence']) is not None


@pytest.mark.parametrize(
  ('divergence', 'expected'),
  [(0.16, '3.2 points, 1.5 to 6.5'), (0.5, 'none: the student is further')],
)
def test_closing_table(coefficients, divergence, expected):
  config = ml_collections.ConfigDict({'eval': {'source': 'npz'}})
  results = {'forecast': forecast.drop(divergence)}
  table = report.closing_table(results, config, 'runs/mine')
  (line,) = [x for x in table.splitlines() if 'forecast' in x]
  assert expected in line
  assert ' the 3 ' in line


def _graph(arch):
  return trace(registry.builder(arch, num_classes=10))


@pytest.mark.parametrize(
  ('arch', 'image_size', 'num_classes'),
  [
    ('resnet20', (28, 28), 10),
    ('resnet20', (32, 32), 100),
    ('efficientnet_lite0', (224, 224), 1000),
    ('resnet18', (192, 256), 1000),
  ],
)
def test_networks_like_those_of_the_fit(arch, image_size, num_classes):
  assert not forecast.unlike(_graph(arch), image_size, num_classes)


def test_a_network_unlike_those_of_the_fit(coefficients):
  graph = _graph('resnet20')
  first, *rest = graph.nodes
  gate = Node('gate', 'mul', ('input', 'input'))
  swish = Node('swish', 'act', ('gate',), act='hard_swish')
  odd = graph_lib.Graph((first, gate, swish, *rest))
  found = forecast.unlike(odd, (299, 299), 3)
  assert found == ['hard_swish', 'mul', '299x299 pixels', '3 classes']
  drop = forecast.drop(0.04, found)
  assert drop == {'drop': 0.8, 'low': 0.35, 'high': 1.65, 'unlike': found}
  assert forecast.drop(0.3, found) is None
  config = ml_collections.ConfigDict({'eval': {'source': 'npz'}})
  table = report.closing_table({'forecast': drop}, config, 'runs/mine')
  assert 'unlike them: hard_swish, mul, 299x299 pixels, 3 classes' in table
  table = report.closing_table(
    {'forecast': forecast.drop(0.04)}, config, 'runs/mine'
  )
  assert 'unlike' not in table


def _record(drop, divergence):
  return {
    'drop': drop,
    'commit': 'abc',
    'images': 5000,
    'synthetic': {'blended_divergence': divergence},
  }


def test_fit():
  # Slopes 10, 20 and 40, whatever the number of runs; no scatter but one's.
  found = fitting.fit(
    {
      'a': [_record(1.0, 0.1), _record(2.0, 0.2), _record(3.0, 0.3)],
      'b': [_record(1.9, 0.1), _record(2.1, 0.1)],
      'c': [_record(4.0, 0.1), _record(8.0, 0.2)],
    }
  )
  assert found['slope'] == pytest.approx(20)
  # t(0.95, 2) = 2.920, of a standard deviation of ln 2 and one network more.
  assert found['factor'] == pytest.approx(
    2 ** (2.920 * (4 / 3) ** 0.5), rel=0.01
  )
  # t(0.95, 4) = 2.132, of 0.02 / 4 squared, in units of the root of 0.1.
  assert found['margin'] == pytest.approx(2.132 * 0.05**0.5, abs=2e-3)
  assert found['largest_divergence'] == 0.3


def test_what_is_forecast_is_not_fitted_on():
  records = [
    _record(drop, 0.1)
    | {'config': config, 'bits': bits, 'placement': placement}
    for config, drop in (('a', 1.0), ('b', 1.0), ('c', 9.0))
    for bits, placement in (
      ('W4A4', 'paper'),
      ('W4A4', 'paper'),
      ('W4A4', 'integer'),
      ('W8A8', 'paper'),
    )
  ]

  def forecasts(field):
    return {
      (found['config'], found['bits'], found['placement']): (
        found['runs'],
        found['drop'],
        round(found['forecast'], 2),
      )
      for found in fitting.left_out(records, field)
    }

  # By network c is forecast from a and b, of slope 10.
  found = forecasts('config')
  assert found['c', 'W4A4', 'paper'] == (2, 9.0, 1.0)
  assert found['c', 'W4A4', 'integer'] == (1, 9.0, 1.0)
  records[-1]['drop'] = 0.0
  # By bits, W8A8 from the runs of W4A4 of all: the cube root of 10 x 10 x 90.
  assert forecasts('bits')['c', 'W8A8', 'paper'] == (1, 0.0, 2.08)
