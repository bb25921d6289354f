"""Tables of the page of results: rows from records, cells, and their origin.

A row is a record, or several records that `pivot` joined. A column
is its head and a format string, for example '{equal:,} of {images:,}'.
"""

import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.records import Record

MISSING = '–'
NETWORKS = {
  'fashion_mnist_resnet20': 'ResNet-20, Fashion-MNIST',
  'cifar10_resnet20_fast': 'ResNet-20, CIFAR-10',
  'cifar100_variant': 'ResNet-20 variant, CIFAR-100',
  'efficientnet_lite0': 'EfficientNet-Lite0, ImageNet',
  'mobilenet_v1_025': 'MobileNetV1 0.25, ImageNet',
  'se_network': 'network with squeeze-excite, Fashion-MNIST',
}
BITS = ('W4A4', 'W3A3', 'W4A8', 'W8A8')
_KINDS = {
  'measured': 'Measured here',
  'computed': 'Computed here, not measured',
  'quoted': 'Quoted, not measured here',
}


class _NoValue(Exception):
  pass


class Seeds(list):
  """Values by seed. A cell shows their mean and, in brackets, each of them."""


class _Cells(string.Formatter):
  """Formats lists of numbers as well as numbers."""

  def format_field(self, value: Any, form: str) -> str:
    if value is None:
      raise _NoValue
    if not isinstance(value, list):
      return format(value, form)
    first, *others = (format(v, form) for v in value)
    if isinstance(value, Seeds):
      mean = format(statistics.mean(value), form)
      return f'{mean} ({", ".join([first, *others])})' if others else mean
    if len(others) == 1:  # the two ends of a range
      return ' to '.join(dict.fromkeys([first, *others]))
    return f'{first} ({" to ".join(others)})'  # median and range


def cell(row: Record, form: str) -> str:
  """Writes a cell; a dash if a value is None or only other rows have it."""
  try:
    return _Cells().vformat(form, (), row)
  except _NoValue:
    return MISSING


def grid(rows: Sequence[Record], columns: Mapping[str, str]) -> str:
  """Writes a Markdown table.

  Args:
    rows: records, or what `pivot` returns.
    columns: format strings, by head.

  Returns:
    The text.

  Raises:
    KeyError: a format string names a field that no row has.
  """
  blank = dict.fromkeys(field for row in rows for field in row)
  lines: list[Iterable[str]] = [columns, ['---'] * len(columns)]
  for row in rows:
    named = blank | {'name': NETWORKS.get(row.get('config'), MISSING)} | row
    lines.append([cell(named, form) for form in columns.values()])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def table(
  rows: Sequence[Record], columns: Mapping[str, str], command: str = ''
) -> str:
  """Writes a table and, below it, where its figures come from.

  Args:
    rows: see `grid`.
    columns: see `grid`.
    command: what makes the figures again.

  Returns:
    The text.
  """
  used = [r for row in rows for r in row.get('records', [row])]
  return f'{grid(rows, columns)}\n\n{origin(used, command)}'


def origin(records: Sequence[Record], command: str = '') -> str:
  """Writes the kind of the figures, their source, machine and command."""
  parts = []
  for kind, text in _KINDS.items():
    some = [r for r in records if r['kind'] == kind]
    commits = sorted({r['commit'] for r in some if 'commit' in r})
    sources = sorted({r['source'] for r in some if 'source' in r})
    if commits:
      sources = [f'commit {", ".join(commits)}', *sources]
    sources = sorted({r['work'] for r in some if 'work' in r}) or sources
    if some:
      parts.append(f'{text}: {"; ".join(sources)}.')
  machines = [
    f'{m["cpu"]}, {count(m["cores"], "core")}' if 'cores' in m else m['cpu']
    for m in (r['machine'] for r in records if 'machine' in r)
  ]
  if machines:
    parts.append(f'Machine: {"; ".join(dict.fromkeys(machines))}.')
  if command:
    parts.append(f'Command: `{command}`.')
  return f'<sub>{" ".join(parts)}</sub>'


def pivot(
  records: Iterable[Record], *keys: str, over: str = ''
) -> list[Record]:
  """Joins records with the same keys.

  Args:
    records: in the order of their values in a row.
    *keys: fields.
    over: a field whose value becomes part of the other fields' names.

  Returns:
    Rows with the keys, with `Seeds` of every other field, such as `drop`, or
    `drop_W4A4` over 'bits', and with the `records`.
  """
  rows: dict[tuple, Record] = {}
  for r in records:
    own = {key: r[key] for key in keys}
    row = rows.setdefault(tuple(own.values()), {**own, 'records': []})
    row['records'].append(r)
    for field, value in r.items():
      if field not in keys:
        name = f'{field}_{r[over]}' if over else field
        row.setdefault(name, Seeds()).append(value)
  return list(rows.values())


def count(number: int, noun: str) -> str:
  """Writes a number with its noun, in the plural where it must be."""
  return f'{number:,} {noun}{"s" * (number != 1)}'
