"""Fits the forecast of the drop to records of runs with real images.

    python benchmarks/forecast.py [RECORDS] [--write]

RECORDS: JSON lines as accuracy.py writes them, which are taken by default.
Printed is how well every network is forecast from the other ones, and every bit
width from the others; --write puts the coefficients from all into the package.
See README.md in this folder and clusterq_jax/forecast.py.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import accuracy
from scipy import stats

from clusterq_jax.runtime import forecast

LEVEL = 0.9  # of the interval
IMAGES = 5000  # that the margin is for: the scatter goes with 1 / images


def divergence(record: dict[str, Any]) -> float:
  return record['synthetic']['blended_divergence']


def fit(networks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
  """Coefficients from records by network, two networks at least.

  Networks count alike, however many runs each has: the slope is the geometric
  mean of theirs, and `factor` the interval for that of one more network, by
  Student's t. `margin`, times the root of the divergence, is the like for a run
  of a known slope: the scatter of seeds and bits, and that of the accuracy
  itself on 5,000 images, which comes from those that student and teacher answer
  differently; their share goes with that root.
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
  """Runs by network, of those that say something about a slope."""
  networks: dict[str, list[dict[str, Any]]] = {}
  for record in records:
    networks.setdefault(record['config'], []).append(record)
  # The slope of a network that loses nothing, or of one run, says nothing.
  return {
    name: runs
    for name, runs in networks.items()
    if len(runs) > 1 and sum(r['drop'] for r in runs) > 0
  }


def leave_out(records: list[dict[str, Any]], field: str) -> Iterator[str]:
  """A table: runs beside what runs of other values of a field say of them."""
  yield f'| without this {field} | network | student | runs | drop | forecast |'
  yield '|---|---|---|---|---|---|'
  for value in dict.fromkeys(r[field] for r in records):
    others = by_network([r for r in records if r[field] != value])
    slope = fit(others)['slope'] if len(others) > 1 else math.nan
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
      if r[field] == value:
        student = f'{r["bits"]} {r["placement"]}'
        groups.setdefault((r['config'], student), []).append(r)
    for (network, student), runs in groups.items():
      drop = statistics.mean(r['drop'] for r in runs)
      guess = slope * statistics.mean(map(divergence, runs))
      yield (
        f'| {value} | {network} | {student} | {len(runs)} | {drop:.2f} | '
        f'{guess:.2f} |'
      )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    'records', nargs='?', type=pathlib.Path, default=accuracy.RECORDS
  )
  parser.add_argument('--write', action='store_true')
  args = parser.parse_args()
  # Lines from before it was measured lack it.
  records = [
    r
    for r in accuracy.read(args.records)
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
    print('\n'.join(leave_out(records, field)) + '\n')
  coefficients = fit(networks)
  print(json.dumps(coefficients, indent=2))
  if args.write:
    forecast.FILE.write_text(json.dumps(coefficients, indent=2) + '\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
