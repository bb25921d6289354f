"""Rows of the tables that join, group or compute from records."""

import statistics
from collections import Counter
from fractions import Fraction
from typing import Any

from benchmarks import ablation as ablation_lib
from benchmarks import forecast as forecast_lib
from benchmarks import records
from benchmarks import zoo as zoo_lib
from benchmarks.records import Record
from benchmarks.results_tables import BITS, NETWORKS, count, pivot

mean = statistics.mean
# Variants of ablations that have records, and options that no longer exist.
_REMOVED = {'absolute_statistics': 'statistics in absolute units'}


def accuracy() -> list[Record]:
  """Makes a row for each network, bit width, placement and recipe."""
  runs = [r | {'recipe': 'present'} for r in records.read('accuracy')]
  evaluated_on = {r['config']: r['evaluated_on'] for r in runs}
  files = records.read('integer', group='files')
  for file in files:
    if file['recipe'] == 'earlier':
      own = {
        'placement': 'integer',
        'teacher': file['float'],
        'agreement': None,
      }
      own['evaluated_on'] = evaluated_on[file['config']]
      runs += [
        {**file, **own, 'seed': i, 'student': s}
        for i, s in enumerate(file['students'])
      ]
  runs = [r | {'drop': r['teacher'] - r['student']} for r in runs]
  names = 'config', 'bits', 'placement', 'recipe'
  order = list(NETWORKS), BITS, ('paper', 'integer'), ('present', 'earlier')
  runs.sort(
    key=lambda r: (
      *(o.index(r[n]) for o, n in zip(order, names, strict=True)),
      r['seed'],
    )
  )
  rows = pivot(runs, *names, 'evaluated_on', 'images', 'teacher')
  exported = {
    (f['config'], f['bits'], 'integer', f['recipe']): f for f in files
  }
  for row in rows:
    if file := exported.get(tuple(row[name] for name in names)):
      row.update({k: file[k] for k in ('size_ratio', 'speedup')})
      row['records'] = [*row['records'], file]
    row['top1'] = mean(row['student'])
    known = [v for v in row['agreement'] if v is not None]
    row['agreement_mean'] = mean(known) if known else None
    row['label'] = f'`{row["placement"]}`' + ', earlier recipe' * (
      row['recipe'] == 'earlier'
    )
    row['time'] = _time(row)
  return rows


def _time(row: Record) -> str | None:
  """Writes the mean time by number of cores; '+' for a student alone."""
  for whole in records.read('run_time'):
    if whole | {k: row[k] for k in ('config', 'bits', 'placement')} == whole:
      row['records'] = [*row['records'], whole]
      return (
        f'{whole["whole_s"]:,} s ({count(whole["machine"]["cores"], "core")})'
      )
  times: dict[tuple[bool, int], list[float]] = {}
  for r in row['records']:
    if 'wall_s' in r:
      key = not r['own_generator'], -r['machine']['cores']
      times.setdefault(key, []).append(r['wall_s'])
  return (
    ', '.join(
      f'{"+ " * taken}{mean(seconds):,.0f} s ({count(-cores, "core")})'
      for (taken, cores), seconds in sorted(times.items())
    )
    or None
  )


def by_placement() -> list[Record]:
  """Makes a row for each network and bit width, with both placements."""
  rows: dict[tuple[str, str], Record] = {}
  for r in accuracy():
    row = rows.setdefault(
      (r['config'], r['bits']), {**r, 'paper': None, 'integer': None}
    )
    if row[r['placement']] is None:
      earlier = ', earlier recipe' * (r['recipe'] == 'earlier')
      seeds = count(len(r['seed']), 'seed')
      row[r['placement']] = f'{mean(r["drop"]):.2f} ({seeds}{earlier})'
    for field in ('size_ratio', 'speedup', 'time'):
      row[field] = row.get(field) or r.get(field)
  return list(rows.values())


def whole_commands() -> list[Record]:
  """Makes a row for each network, bit width and budget of whole commands."""
  runs = records.read('whole_commands')
  networks = list(NETWORKS)
  runs.sort(
    key=lambda r: (
      networks.index(r['config']),
      BITS.index(r['bits']),
      r['budget'],
      r['seed'],
    )
  )
  rows = pivot(runs, 'config', 'bits', 'budget', 'evaluated_on', 'images')
  for row in rows:
    row['fraction'] = str(Fraction(row['budget']).limit_denominator(100))
    for of in ('seconds', 'drop', 'divergence', 'peak_rss_mb'):
      row[f'mean_{of}'] = mean(row[of])
  return rows


def time_to_published() -> list[Record]:
  """Makes a row for each published drop that whole commands reach.

  The smallest budget counts whose mean drop is at most the published one.
  """
  rows = whole_commands()
  found = []
  for paper in records.read('published', group='drop'):
    named = {'config': paper['config'], 'bits': paper['bits']}
    enough = [
      row
      for row in rows
      if named.items() <= row.items() and row['mean_drop'] <= paper['drop']
    ]
    if enough:
      smallest = min(enough, key=lambda row: row['budget'])
      both = [*smallest['records'], paper]
      found.append({**smallest, 'paper': paper, 'records': both})
  return found


def ablation(group: str) -> list[Record]:
  """Makes a row for each variant of a group, with the last step's values."""
  variants = ablation_lib.GROUPS[group]
  labels = {name: label for name, (label, _) in variants.items()}
  runs = records.read('ablation', config=ablation_lib.CONFIGS[group])
  if group != 'class_terms':
    for r in runs:
      if r['variant'] in _REMOVED:
        text = _REMOVED[r['variant']]
        labels[r['variant']] = f'{text} (option of commit {r["commit"]})'
  order = list(labels)
  chosen = sorted(
    (r for r in runs if r['variant'] in labels),
    key=lambda r: (order.index(r['variant']), r['seed']),
  )
  rows = pivot(
    (
      r
      | {'drop': r['drops'][-1], 'divergence': r['divergences'][-1]}
      | {'start': r['drops'][0]}
      for r in chosen
    ),
    'variant',
    over='bits',
  )
  for row in rows:
    row['label'] = labels[row['variant']]
    for bits in ablation_lib.BITS:
      row[f'change_{bits}'] = _change(rows[0], row, bits)
  return rows


def _change(first: Record, other: Record, bits: str) -> float:
  """Computes the change of the KL, in %, from the seeds that both have."""
  a, b = (
    dict(zip(r[f'seed_{bits}'], r[f'divergence_{bits}'], strict=True))
    for r in (first, other)
  )
  both = a.keys() & b.keys()
  return 100 * (mean(b[s] for s in both) / mean(a[s] for s in both) - 1)


def class_term_facts() -> dict[str, float]:
  """Computes what the class terms gain, and how much seeds scatter.

  Returns:
    Least and largest gain in mean drop over no class terms, in points; by bit
    width the mean standard deviation between seeds of the drop and of the KL,
    and the mean drop of the students before training.
  """
  none, *others = rows = ablation('class_terms')
  facts: dict[str, float] = {'variants': len(others)}
  gains = []
  for bits in ablation_lib.BITS:
    for of in ('drop', 'divergence'):
      values = (row[f'{of}_{bits}'] for row in rows)
      facts[f'{bits}_{of}_deviation'] = mean(map(statistics.stdev, values))
    facts[f'{bits}_start'] = mean(mean(row[f'start_{bits}']) for row in rows)
    drop = f'drop_{bits}'
    gains += [mean(none[drop]) - mean(row[drop]) for row in others]
  return facts | {'least': min(gains), 'largest': max(gains)}


def pairs(group: str) -> list[Record]:
  """Makes a row for each network and bit width, with and without one thing."""
  runs = records.read('pairs', group=group)
  for r in runs:
    if group == 'moved_images' and r['with']:  # a run of the first table
      run = {k: r[k] for k in ('config', 'bits', 'seed')}
      r['drop'] = records.only('accuracy', placement='paper', **run)['drop']
  rows = pivot(runs, 'config', 'bits', over='with')
  for row in rows:
    kl, without = mean(row['divergence_True']), mean(row['divergence_False'])
    row['change'] = 100 * (kl / without - 1)
  return rows


def forecast() -> list[Record]:
  """Makes a row for each student, with the forecasts from other runs."""
  runs = records.read('accuracy')
  rows: dict[tuple, dict[str, Any]] = {}
  for field in ('config', 'bits'):
    for row in forecast_lib.left_out(runs, field):
      key = row['config'], row['bits'], row['placement']
      own = rows.setdefault(key, {**row, 'records': runs})
      own[f'from_{field}'] = row['forecast']
  return list(rows.values())


def forecast_error(field: str, least: float) -> float:
  """Computes the largest factor by which forecasts from other runs miss.

  Args:
    field: 'config' for other networks, 'bits' for other bit widths.
    least: only drops of this many points or more count.
  """
  ratios = [
    row[f'from_{field}'] / row['drop']
    for row in forecast()
    if row['drop'] >= least
  ]
  return max(max(r, 1 / r) for r in ratios)


def zoo() -> list[Record]:
  """Makes a row for each source of foreign networks, and one for all."""
  found = records.read('zoo')
  without = {n.name for n in zoo_lib.networks() if n.found == 'no BatchNorm'}
  rows = []
  for source in (*dict.fromkeys(r['name'].split(':')[0] for r in found), ''):
    some = [r for r in found if r['name'].startswith(source)]
    counts = Counter(map(zoo_lib.outcome, some))
    exported = [r for r in some if 'exact' in r]
    timed = [r for r in some if 'speedup' in r]
    rows.append(
      {
        'source': source or 'all',
        'tried': len(some),
        'batch_norm': sum(r['name'] not in without for r in some),
        'parity': sum(r.get('parity', 1) <= zoo_lib.PARITY for r in some),
        'refused': counts['refused'],
        'student': sum('student_error' in r for r in some),
        'exported': len(exported),
        'exact': counts['exact'],
        'difference': max((r['difference'] for r in exported), default=None),
        'size_ratio': _range(
          [r['float32_kb'] / r['integer_kb'] for r in exported]
        ),
        'speedup': _range([r['speedup'] for r in timed]),
        'records': some,
      }
    )
  return rows


def _range(values: list[float]) -> list[float] | None:
  """Returns median, smallest and largest value."""
  return (
    [statistics.median(values), min(values), max(values)] if values else None
  )


def zoo_outcomes() -> list[Record]:
  """Makes a row for each outcome, with the names of its networks."""
  found = records.read('zoo')
  names: dict[str, list[str]] = {}
  for record in found:
    names.setdefault(zoo_lib.outcome(record), []).append(record['name'])
  return [
    {'outcome': outcome, 'count': len(own), 'names': ', '.join(own)}
    for outcome, own in sorted(names.items(), key=lambda x: -len(x[1]))
    if outcome != 'refused'
  ]


def zoo_reasons() -> list[Record]:
  """Makes a row for each network that stopped early or has no parity."""
  rows = []
  for record in records.read('zoo'):
    reason = record.get('reason', '').replace('|', '/')
    if record.get('torch_rounding'):
      reason = (
        f'differs by {record["parity"]:.1e}; torch in float32 differs from '
        f'torch in float64 by {record["torch_rounding"]:.1e}'
      )
    if reason:
      outcome = zoo_lib.outcome(record)
      rows.append(record | {'outcome': outcome, 'reason': reason})
  return rows
