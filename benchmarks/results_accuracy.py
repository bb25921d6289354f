"""Tables of accuracy, size and speed: for the page and for README.md."""

import dataclasses
import itertools
from typing import Any

from benchmarks import records
from benchmarks.records import Record
from benchmarks.results_format import (
  BITS,
  MISSING,
  NETWORKS,
  Table,
  count,
  figure,
  mean,
)

ACCURACY = 'python -m benchmarks.accuracy all'


@dataclasses.dataclass(frozen=True)
class Row:
  """Students of one network, bit width, placement and recipe.

  runs: their records, by seed; empty where only the old text has figures.
  file: the record of the exported integer file, or None.
  whole: the record of the time of a whole run, or None.
  """

  config: str
  bits: str
  placement: str
  recipe: str
  evaluated_on: str
  images: int
  teacher: float
  students: list[float]
  agreement: float | None
  runs: list[Record]
  file: Record | None
  whole: Record | None

  @property
  def drops(self) -> list[float]:
    """Lists the drops in points, by seed."""
    return [self.teacher - student for student in self.students]

  @property
  def records(self) -> list[Record]:
    """Lists all records that the row is made from."""
    return [*self.runs, *filter(None, (self.file, self.whole))]


def _first(name: str, **fields: Any) -> Record | None:
  try:
    return records.only(name, **fields)
  except ValueError:
    return None


def _measured_row(runs: list[Record]) -> Row:
  first = runs[0]
  config, bits, placement = (first[k] for k in ('config', 'bits', 'placement'))
  named = {'config': config, 'bits': bits}
  integer = placement == 'integer'
  return Row(
    **named,
    placement=placement,
    recipe='present',
    evaluated_on=first['evaluated_on'],
    images=first['images'],
    teacher=first['teacher'],
    students=[r['student'] for r in runs],
    agreement=mean(r['agreement'] for r in runs),
    runs=runs,
    file=_first('integer', group='files', recipe='present', **named)
    if integer
    else None,
    whole=_first('run_time', placement=placement, **named),
  )


def _earlier_row(file: Record, evaluated_on: str) -> Row:
  return Row(
    config=file['config'],
    bits=file['bits'],
    placement='integer',
    recipe='earlier',
    evaluated_on=evaluated_on,
    images=file['images'],
    teacher=file['float'],
    students=file['students'],
    agreement=None,
    runs=[],
    file=file,
    whole=None,
  )


def rows() -> list[Row]:
  """Makes the rows, in the order of networks, bit widths and placements."""
  runs = sorted(records.read('accuracy'), key=lambda r: r['seed'])
  groups: dict[tuple, list[Record]] = {}
  for r in runs:
    key = r['config'], r['bits'], r['placement']
    groups.setdefault(key, []).append(r)
  found = [_measured_row(group) for group in groups.values()]
  images = {r['config']: r['evaluated_on'] for r in runs}
  found += [
    _earlier_row(file, images[file['config']])
    for file in records.read('integer', group='files', recipe='earlier')
  ]
  networks = list(NETWORKS)
  return sorted(
    found,
    key=lambda row: (
      networks.index(row.config),
      BITS.index(row.bits),
      row.placement != 'paper',
      row.recipe != 'present',
    ),
  )


def _time(row: Row) -> str:
  """Writes the mean time by number of cores; '+' for a student alone."""
  if row.whole:
    cores = count(row.whole['machine']['cores'], 'core')
    return f'{row.whole["whole_s"]:,} s ({cores})'

  def kind(r: Record) -> tuple[bool, int]:
    return not r['own_generator'], -r['machine']['cores']

  parts = []
  for (taken, cores), some in itertools.groupby(
    sorted(row.runs, key=kind), kind
  ):
    seconds = mean(r['wall_s'] for r in some)
    sign = '+ ' if taken else ''
    parts.append(f'{sign}{seconds:,.0f} s ({count(-cores, "core")})')
  return ', '.join(parts) or MISSING


def _speed(row: Row) -> str:
  return figure(row.file and row.file['speedup'], '.1f ×')


def _size(row: Row) -> str:
  return f'1/{row.file["size_ratio"]:.1f}' if row.file else MISSING


def _placement(row: Row) -> str:
  earlier = ', earlier recipe' * (row.recipe == 'earlier')
  return f'`{row.placement}`{earlier}'


def accuracy() -> Table:
  """Makes the first table of the page: a row per student."""
  found = rows()
  cells = [
    [
      NETWORKS[row.config],
      row.bits,
      _placement(row),
      f'{row.evaluated_on}, {row.images:,}',
      f'{row.teacher:.2f}',
      f'{mean(row.students):.2f}',
      f'{mean(row.drops):.2f}',
      ', '.join(f'{drop:.2f}' for drop in row.drops),
      figure(row.agreement, '.1f'),
      _size(row),
      _speed(row),
      _time(row),
    ]
    for row in found
  ]
  heads = [
    'network',
    'bits',
    'placement',
    'evaluated on, images',
    'float32 top-1, %',
    'quantized top-1, %',
    'drop, points',
    'drop by seed, points',
    'agreement, %',
    'file size against float32',
    'speed against float32',
    'time of the run',
  ]
  return Table(heads, cells, [r for x in found for r in x.records], ACCURACY)


def readme() -> Table:
  """Makes the table of README.md: a row per network and bit width."""
  chosen: dict[tuple[str, str], Row] = {}
  for row in rows():
    key = row.config, row.bits
    known = chosen.get(key)
    better = row.placement == 'integer' and row.recipe == 'present'
    if known is None or known.placement == 'paper' or better:
      chosen[key] = row
  cells = [
    [
      NETWORKS[row.config],
      row.bits,
      _placement(row),
      f'{row.teacher:.2f}',
      f'{mean(row.students):.2f}',
      f'{mean(row.drops):.2f}',
      str(len(row.students)),
      _size(row),
      _speed(row),
      _time(row),
    ]
    for row in chosen.values()
  ]
  heads = [
    'network, data',
    'bits',
    'placement',
    'float32 top-1, %',
    'quantized top-1, %',
    'drop, points',
    'seeds',
    'file size',
    'speed',
    'time of the run',
  ]
  used = [r for x in chosen.values() for r in x.records]
  return Table(heads, cells, used, ACCURACY)


def whole_times() -> list[dict[str, str]]:
  """Lists the times of whole W4A4 runs, of generator and student.

  Returns:
    For each network: its name and the time, as text.
  """
  return [
    {'name': NETWORKS[row.config], 'time': _time(row)}
    for row in rows()
    if row.bits == 'W4A4' and row.placement == 'paper'
  ]


def repeated() -> list[dict[str, Any]]:
  """Compares `integer` and `paper` placement where both were run.

  Returns:
    For each pair: network and bits, as text, and the mean drops in points.
  """
  found: dict[tuple[str, str], dict[str, Row]] = {}
  for row in rows():
    if row.recipe == 'present':
      found.setdefault((row.config, row.bits), {})[row.placement] = row
  return [
    {
      'name': f'{NETWORKS[config]}, {bits}',
      **{name: mean(row.drops) for name, row in pair.items()},
      **{f'{name}_seeds': len(row.drops) for name, row in pair.items()},
    }
    for (config, bits), pair in found.items()
    if len(pair) == 2
  ]
