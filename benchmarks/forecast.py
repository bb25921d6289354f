"""Fits the forecast of the drop to records of runs with real images.

    python -m benchmarks.forecast [RECORDS] [--write]

RECORDS are JSON lines as accuracy.py writes them; by default its file. The
script prints how well each network is forecast from the other networks, and
each bit width from the others. --write puts the coefficients of all records
into the package. See clusterq_jax/runtime/forecast.py.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from scipy import stats

from benchmarks import accuracy
from benchmarks import records as records_lib
from clusterq_jax.runtime import forecast

LEVEL = 0.9  # of the interval
IMAGES = 5000  # of the margin; the variance of a drop goes with 1 / images


def divergence(record: dict[str, Any]) -> float:
  return record['synthetic']['blended_divergence']


def fit(networks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
  """Fits the coefficients to records by network.

  Every network has the same weight, however many runs it has. The slope is the
  geometric mean over the networks, and `factor` is the interval for one more
  network, by Student's t. `margin`, times the root of the divergence, is the
  interval for a run whose slope is known. It covers the scatter of seeds and
  bits, and of the accuracy on 5,000 images. The latter comes from images that
  student and teacher answer differently; their share grows with that root.

  Args:
    networks: records by network, of two networks or more.

  Returns:
    What the package's forecast file holds.
  """
  slopes = {
    name: sum(r['drop'] for r in runs) / sum(map(divergence, runs))
    for name, runs in networks.items()
  }
  logs, count = [math.log(s) for s in slopes.values()], len(slopes)
  width = stats.t.ppf((1 + LEVEL) / 2, count - 1) * math.sqrt(1 + 1 / count)
  squares = [
    (r['drop'] - slopes[name] * divergence(r)) ** 2
    / divergence(r)
    * (r['images'] / IMAGES)
    for name, runs in networks.items()
    for r in runs
  ]
  free = len(squares) - count
  scatter = math.sqrt(sum(squares) / free)
  return {
    'slope': round(math.exp(statistics.mean(logs)), 3),
    'factor': round(math.exp(min(width * statistics.stdev(logs), 10)), 3),
    'margin': round(stats.t.ppf((1 + LEVEL) / 2, free) * scatter, 3),
    'largest_divergence': max(
      divergence(r) for runs in networks.values() for r in runs
    ),
    'level': LEVEL,
    'networks': {name: len(runs) for name, runs in networks.items()},
    'commits': sorted({r['commit'] for v in networks.values() for r in v}),
  }


def by_network(records: list[dict[str, Any]]) -> dict[str, list[dict]]:
  """Returns the runs of each network whose slope can be estimated."""
  networks: dict[str, list[dict[str, Any]]] = {}
  for record in records:
    networks.setdefault(record['config'], []).append(record)
  # One run, or a network that loses nothing, gives no slope.
  return {
    name: runs
    for name, runs in networks.items()
    if len(runs) > 1 and sum(r['drop'] for r in runs) > 0
  }


def left_out(
  records: list[dict[str, Any]], field: str
) -> Iterator[dict[str, Any]]:
  """Forecasts every student from the runs with other values of a field.

  Args:
    records: runs, as accuracy.py writes them.
    field: 'config' forecasts from other networks, 'bits' from other widths.

  Yields:
    For each student: config, bits, placement, number of runs, mean drop and
    forecast drop, both in points.
  """
  for value in dict.fromkeys(r[field] for r in records):
    others = by_network([r for r in records if r[field] != value])
    slope = fit(others)['slope'] if len(others) > 1 else math.nan
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
      if r[field] == value:
        student = r['config'], r['bits'], r['placement']
        groups.setdefault(student, []).append(r)
    for (config, bits, placement), runs in groups.items():
      yield {
        'config': config,
        'bits': bits,
        'placement': placement,
        'runs': len(runs),
        'drop': statistics.mean(r['drop'] for r in runs),
        'forecast': slope * statistics.mean(map(divergence, runs)),
      }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    'records', nargs='?', type=pathlib.Path, default=accuracy.RECORDS
  )
  parser.add_argument('--write', action='store_true')
  args = parser.parse_args()
  # Older lines lack the divergence.
  records = [
    r
    for r in records_lib.lines(args.records)
    if 'blended_divergence' in r['synthetic']
  ]
  networks = by_network(records)
  if len(networks) < 3:
    print(
      f'error: {args.records}: records of {len(networks)} networks with two '
      'runs and a drop; expected 3, so that each can be left out',
      file=sys.stderr,
    )
    return 2
  for field in ('config', 'bits'):
    print(f'each {field} from the other ones, drops in points:')
    print(*left_out(records, field), sep='\n')
  coefficients = fit(networks)
  print(json.dumps(coefficients, indent=2))
  if args.write:
    forecast.FILE.write_text(json.dumps(coefficients, indent=2) + '\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
