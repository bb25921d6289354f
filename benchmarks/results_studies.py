"""Tables of studies: time to accuracy, ablations, pairs and forecasts."""

import functools
import statistics
from typing import Any

from benchmarks import records
from benchmarks.records import Record
from benchmarks.results_format import Table, figure, mean, network

GROUPS = {
  'class_terms': (
    'cifar10_resnet20_fast',
    {
      'none': 'no class terms (a2 = a3 = 0)',
      'recipe': 'class terms of the recipe',
      'no_diversity': 'without the diversity loss',
      'no_ema': 'without EMA of the centroids',
      'neither': 'without both',
      'sfda_raised': 'a2 raised by a3, no diversity loss',
      'summed': 'summed over classes (eq. 4)',
      'late': 'in the last stage alone',
      'everywhere': 'in all layers',
      'paper_noise': "with the paper's noise on the centroids",
    },
  ),
  'ideas': (
    'cifar10_resnet20_fast',
    {
      'recipe': 'recipe of that time',
      'minmax_ranges': 'largest-magnitude ranges, plain rounding',
      'no_features': 'without distillation of features',
      'no_procedural': 'without procedural images',
      'no_generator': 'procedural images alone, as many',
      'no_headroom': 'without headroom',
      'unconditional': "generator's BatchNorm without classes",
      'no_prototypes': 'without prototypes of classes',
      'no_mixup': 'without blended images (mixup)',
      'absolute_statistics': 'statistics in absolute units',
      'cross_entropy': 'with cross-entropy',
    },
  ),
}
GROUPS['many_classes'] = (
  'cifar100_variant',
  {
    name: GROUPS['ideas'][1][name]
    for name in (
      'recipe',
      'no_headroom',
      'unconditional',
      'no_prototypes',
      'no_mixup',
      'absolute_statistics',
    )
  },
)
ABLATED_BITS = ('W4A4', 'W3A3')
_PYTHON = 'python -m benchmarks.'


@functools.cache
def ablated(group: str) -> list[Record]:
  """Reads the records of one group of ablations, in the order of its names."""
  config, names = GROUPS[group]
  found = [
    r for r in records.read('ablation', config=config) if r['variant'] in names
  ]
  order = list(names)
  return sorted(found, key=lambda r: (order.index(r['variant']), r['seed']))


def ends(group: str, variant: str, bits: str, of: str) -> dict[int, float]:
  """Reads the last value of 'drops' or 'divergences', by seed."""
  return {
    r['seed']: r[of][-1]
    for r in ablated(group)
    if (r['variant'], r['bits']) == (variant, bits)
  }


def change(group: str, variant: str, bits: str) -> float:
  """Computes the change of the divergence against a group's first variant.

  Returns:
    The change in %, from the seeds that both variants have.
  """
  first = ends(group, next(iter(GROUPS[group][1])), bits, 'divergences')
  other = ends(group, variant, bits, 'divergences')
  both = first.keys() & other.keys()
  base = mean(first[seed] for seed in both)
  return 100 * (mean(other[seed] for seed in both) / base - 1)


def ablation(group: str) -> Table:
  """Makes the table of one group: means, every seed, change of the KL."""
  names = GROUPS[group][1]
  heads = ['variant']
  for bits in ABLATED_BITS:
    heads += [f'{bits} drop, points', f'{bits} KL, nats', f'{bits} KL, change']
  rows = []
  for name, text in names.items():
    cells = [f'{text} (`{name}`)']
    for bits in ABLATED_BITS:
      for of, form in (('drops', '.2f'), ('divergences', '.4f')):
        values = ends(group, name, bits, of).values()
        seeds = ', '.join(format(v, form) for v in values)
        cells.append(f'{mean(values):{form}} ({seeds})')
      percent = round(change(group, name, bits))
      cells.append(f'{percent:+d} %' if percent else '0 %')
    rows.append(cells)
  return Table(heads, rows, ablated(group), f'{_PYTHON}ablation {group}')


def class_term_facts() -> dict[str, float]:
  """Computes what the class terms gain, and how much seeds scatter.

  Returns:
    Least and largest gain in mean drop over no class terms, in points; mean
    standard deviation between seeds of the drop and of the divergence, by bit
    width; mean drop of the students before training.
  """
  names = list(GROUPS['class_terms'][1])
  facts: dict[str, float] = {'variants': len(names) - 1}
  gains = []
  for bits in ABLATED_BITS:
    for of in ('drops', 'divergences'):
      values = {n: ends('class_terms', n, bits, of).values() for n in names}
      facts[f'{bits}_{of}_deviation'] = mean(
        map(statistics.stdev, [*values.values()])
      )
      if of == 'drops':
        none = mean(values['none'])
        gains += [none - mean(v) for n, v in values.items() if n != 'none']
    facts[f'{bits}_start'] = mean(
      r['drops'][0] for r in ablated('class_terms') if r['bits'] == bits
    )
  return facts | {'least': min(gains), 'largest': max(gains)}


def time_to_accuracy() -> Table:
  """Makes the table of seconds until the published drops."""
  found = records.read('time_to_accuracy')
  targets = {
    r['method']: r
    for r in records.read(
      'published', group='drop', config=found[0]['config'], bits='W4A4'
    )
  }
  heads = [
    'method',
    *(f"s to {n}'s {r['drop']:.2f} points" for n, r in targets.items()),
    's at the end',
    'drop at the end, points',
    'KL at the end, nats',
  ]
  rows = [
    [
      r['method'],
      *(figure(r['reached_s'][name] or 'never') for name in targets),
      figure(r['end_s']),
      figure(r['drop'], '.2f'),
      figure(r['divergence'], '.4f'),
    ]
    for r in found
  ]
  command = f'{_PYTHON}time_to_accuracy --seeds 0'
  return Table(heads, rows, found + list(targets.values()), command)


def _pairs(group: str) -> list[Record]:
  """Reads pairs; the drops of recorded runs come from accuracy.jsonl."""
  found = []
  for r in records.read('pairs', group=group):
    if group == 'moved_images' and r['with']:
      run = {k: r[k] for k in ('config', 'bits', 'seed')}
      run = records.only('accuracy', placement='paper', **run)
      r = r | {'drop': run['drop']}
    found.append(r)
  return found


def pairs(group: str, command: str, **forms: str) -> Table:
  """Makes a table of runs with and without one thing, pair by pair.

  Args:
    group: of the records.
    command: what makes the figures again.
    **forms: fields to show, 'drop' or 'divergence', with their formats.

  Returns:
    The table.
  """
  found = _pairs(group)
  shown = list(forms.items())
  units = {'drop': 'drop, points', 'divergence': 'KL, nats'}
  heads = ['network', 'bits', 'seed']
  for of, _ in shown:
    heads += [f'{units[of]}, with', f'{units[of]}, without']
  sides: dict[tuple, dict[bool, Record]] = {}
  for r in found:
    key = network(r), r['bits'], str(r['seed'])
    sides.setdefault(key, {})[r['with']] = r
  rows = [
    [
      *key,
      *(f'{side[w][of]:{form}}' for of, form in shown for w in (True, False)),
    ]
    for key, side in sides.items()
  ]
  return Table(heads, rows, found, command)


def pair_facts(group: str) -> dict[str, dict[str, float]]:
  """Computes means of pairs and the change of the divergence.

  Returns:
    By config and bits, as 'cifar100_variant W4A4': change of the divergence by
    the thing, in %; mean drops with and without, in points, if recorded.
  """
  groups: dict[str, list[Record]] = {}
  for r in _pairs(group):
    groups.setdefault(f'{r["config"]} {r["bits"]}', []).append(r)
  facts = {}
  for key, runs in groups.items():
    sides = {w: [r for r in runs if r['with'] == w] for w in (True, False)}
    kl = {w: mean(r['divergence'] for r in side) for w, side in sides.items()}
    facts[key] = {'change': 100 * (kl[True] / kl[False] - 1)}
    if 'drop' in runs[0]:
      facts[key] |= {
        name: mean(r['drop'] for r in sides[w])
        for name, w in (('drop_with', True), ('drop_without', False))
      }
  return facts


@functools.cache
def _forecasts() -> list[dict[str, Any]]:
  from benchmarks import forecast

  runs = records.read('accuracy')
  found: dict[tuple, dict[str, Any]] = {}
  for field in ('config', 'bits'):
    for row in forecast.left_out(runs, field):
      key = row['config'], row['bits'], row['placement']
      found.setdefault(key, row)[field + '_forecast'] = row['forecast']
  return list(found.values())


def forecast() -> Table:
  """Makes the table of drops and of what other runs say of them."""
  rows = [
    [
      network(row),
      row['bits'],
      f'`{row["placement"]}`',
      str(row['runs']),
      f'{row["drop"]:.2f}',
      f'{row["config_forecast"]:.2f}',
      f'{row["bits_forecast"]:.2f}',
    ]
    for row in _forecasts()
  ]
  heads = [
    'network',
    'bits',
    'placement',
    'runs',
    'drop, points',
    'forecast from other networks, points',
    'forecast from other bit widths, points',
  ]
  runs = records.read('accuracy')
  return Table(heads, rows, runs, f'{_PYTHON}forecast')


def forecast_facts(least: float) -> dict[str, float]:
  """Computes by what factor the forecasts miss.

  Args:
    least: only drops of this many points or more count.

  Returns:
    The largest factor from other networks (`config`) and from other bit
    widths (`bits`); smallest agreement on images that are not blended, in %.
  """
  rows = [row for row in _forecasts() if row['drop'] >= least]

  def worst(field: str) -> float:
    ratios = [row[field] / row['drop'] for row in rows]
    return max(max(r, 1 / r) for r in ratios)

  small = [
    r['synthetic']['agreement']
    for r in records.read('accuracy')
    if r['config'] != 'efficientnet_lite0'
  ]
  return {
    'config': worst('config_forecast'),
    'bits': worst('bits_forecast'),
    'agreement_low': min(small),
    'agreement_high': max(small),
  }
