"""Fits the forecast of the drop to records of runs with real images.

    python benchmarks/forecast.py [RECORDS] [--write]

RECORDS: JSON lines as accuracy.py writes them, which are taken by default.
Printed is how well every network is forecast from the other ones; --write puts
the coefficients from all of them into the package. See README.md in this folder
and clusterq_jax/forecast.py.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
from typing import Any

import accuracy
from scipy import stats

from clusterq_jax import forecast

LEVEL = 0.9  # of the interval


def divergence(record: dict[str, Any]) -> float:
  return record['synthetic']['blended_divergence']


def fit(networks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
  """Coefficients from records by network, two networks at least.

  Networks count alike, however many runs each has: the slope is the geometric
  mean of theirs, and `factor` the interval for that of one more network, by
  Student's t. `margin` is the like for a run of a known slope: the scatter of
  seeds and bits, and that of the accuracy itself on so many images.
  """
  slopes = {
    name: sum(r['drop'] for r in runs) / sum(map(divergence, runs))
    for name, runs in networks.items()
  }
  logs, count = [math.log(s) for s in slopes.values()], len(slopes)
  width = stats.t.ppf((1 + LEVEL) / 2, count - 1) * math.sqrt(1 + 1 / count)
  residuals = [
    r['drop'] - slopes[name] * divergence(r)
    for name, runs in networks.items()
    for r in runs
  ]
  free = len(residuals) - count
  scatter = math.sqrt(sum(e**2 for e in residuals) / free)
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


def leave_one_out(networks: dict[str, list[dict[str, Any]]]) -> None:
  """Prints each network's runs beside what the other networks say of them."""
  print('| network | bits | runs | drop | forecast | off by |')
  print('|---|---|---|---|---|---|')
  for name, runs in networks.items():
    others = {k: v for k, v in networks.items() if k != name}
    slope = fit(others)['slope']
    for bits in dict.fromkeys(r['bits'] for r in runs):
      some = [r for r in runs if r['bits'] == bits]
      drop = statistics.mean(r['drop'] for r in some)
      guess = slope * statistics.mean(map(divergence, some))
      print(
        f'| {name} | {bits} | {len(some)} | {drop:.2f} | {guess:.2f} | '
        f'{guess - drop:+.2f} |'
      )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    'records', nargs='?', type=pathlib.Path, default=accuracy.RECORDS
  )
  parser.add_argument('--write', action='store_true')
  args = parser.parse_args()
  networks: dict[str, list[dict[str, Any]]] = {}
  for record in accuracy.read(args.records):
    # Lines from before it was measured lack it.
    if 'blended_divergence' in record['synthetic']:
      networks.setdefault(record['config'], []).append(record)
  # Slopes of a network that loses nothing, or of one run, say nothing.
  networks = {
    name: runs
    for name, runs in networks.items()
    if len(runs) > 1 and sum(r['drop'] for r in runs) > 0
  }
  if len(networks) < 3:
    print(
      f'error: {args.records}: records of {len(networks)} networks with two '
      'runs and a drop; expected 3, so that each can be left out',
      file=sys.stderr,
    )
    return 2
  leave_one_out(networks)
  coefficients = fit(networks)
  print(json.dumps(coefficients, indent=2))
  if args.write:
    forecast.FILE.write_text(json.dumps(coefficients, indent=2) + '\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
