"""Text of figures, of tables and of where a table comes from, in Markdown."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.records import Record

MISSING = '–'
NETWORKS = {
  'fashion_mnist_resnet20': 'ResNet-20, Fashion-MNIST',
  'cifar10_resnet20_fast': 'ResNet-20, CIFAR-10',
  'cifar100_variant': 'ResNet-20 variant, CIFAR-100',
  'efficientnet_lite0': 'EfficientNet-Lite0, ImageNet',
}
BITS = ('W4A4', 'W3A3', 'W4A8', 'W8A8')
_KINDS = {
  'measured': 'Measured here',
  'computed': 'Computed here, not measured',
  'quoted': 'Quoted, not measured here',
}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the page.

  heads: of the columns.
  rows: cells, as text.
  records: all that the cells are made from.
  command: what makes the figures again; empty if nothing does.
  """

  heads: Sequence[str]
  rows: Sequence[Sequence[str]]
  records: Sequence[Record]
  command: str = ''

  def markdown(self) -> str:
    """Writes the table and, below it, where its figures come from."""
    return f'{grid(self.heads, self.rows)}\n\n{self.origin()}'

  def origin(self) -> str:
    """Says the kind of the figures, their source, machine and command."""
    parts = []
    for kind, text in _KINDS.items():
      some = [r for r in self.records if r['kind'] == kind]
      if some:
        parts.append(f'{text}: {"; ".join(_sources(some))}.')
    machines = [m for m in map(_machine, self.records) if m]
    if machines:
      parts.append(f'Machine: {"; ".join(dict.fromkeys(machines))}.')
    if self.command:
      parts.append(f'Command: `{self.command}`.')
    return f'<sub>{" ".join(parts)}</sub>'


def _sources(records: Iterable[Record]) -> list[str]:
  commits = sorted({r['commit'] for r in records if 'commit' in r})
  texts = sorted({r['source'] for r in records if 'source' in r})
  works = sorted({r['work'] for r in records if 'work' in r})
  if works:
    return works
  many = 'commits' if len(commits) > 1 else 'commit'
  return ([f'{many} {", ".join(commits)}'] if commits else []) + texts


def _machine(record: Record) -> str:
  machine = record.get('machine')
  if not machine:
    return ''
  cores = machine.get('cores')
  if not cores:
    return machine['cpu']
  return f'{machine["cpu"]}, {count(cores, "core")}'


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Writes a Markdown table."""
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def count(number: int, noun: str) -> str:
  """Writes a number with its noun, in the plural where it must be."""
  return f'{number:,} {noun}{"s" * (number != 1)}'


def figure(value: Any, form: str = '') -> str:
  """Writes a cell.

  Args:
    value: text, a number, None, or [median, smallest, largest].
    form: format of a number, as in f-strings, with a unit behind a space.

  Returns:
    The number, or the median with its range in brackets.
  """
  if value is None:
    return MISSING
  if isinstance(value, str):
    return value
  form, _, unit = form.partition(' ')
  unit = f' {unit}' if unit else ''
  if isinstance(value, list):
    middle, low, high = (format(v, form) for v in value)
    return f'{middle}{unit} ({low} to {high})'
  return f'{value:{form}}{unit}'


def mean(values: Iterable[float]) -> float:
  """Computes the mean; a short name for the template."""
  return statistics.mean(values)


def network(record: Record) -> str:
  """Names the network and the data of a record."""
  return NETWORKS[record['config']]


Column = tuple[str, str | Callable[[Record], Any], str]


def plain(
  columns: Sequence[Column], records: Sequence[Record], command: str = ''
) -> Table:
  """Makes a table with one row per record.

  Args:
    columns: head, field of a record or function of it, and format.
    records: of the rows.
    command: what makes the figures again.

  Returns:
    The table.
  """
  rows = []
  for record in records:
    cells = []
    for _, field, form in columns:
      value = field(record) if callable(field) else record[field]
      cells.append(figure(value, form))
    rows.append(cells)
  return Table([head for head, *_ in columns], rows, records, command)
