"""Records of results: one JSON object per line of the files in records/.

Every record says how its figures came about (`kind`) and where they come from:
`commit`, if a script wrote the line; `source`, if a person copied the figures
from an older text. A measured record also names its machine.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

FOLDER = pathlib.Path(__file__).parent / 'records'
KINDS = ('measured', 'computed', 'quoted')

Record = dict[str, Any]


def lines(file: pathlib.Path) -> list[Record]:
  """Reads a file of records; a missing file has none."""
  text = file.read_text() if file.exists() else ''
  return [json.loads(line) for line in text.splitlines()]


def append(file: pathlib.Path, *new: Record) -> None:
  """Adds records to a file.

  Raises:
    ValueError: a record lacks something.
  """
  for record in new:
    if problems(record):
      raise ValueError(f'{file}: {"; ".join(problems(record))}: {record}')
  with file.open('a') as f:
    f.writelines(json.dumps(record) + '\n' for record in new)


def read(name: str, **fields: Any) -> list[Record]:
  """Reads the records of one file.

  Args:
    name: of the file, without folder and suffix.
    **fields: only records with these values are returned.

  Returns:
    The records, in the order of the file.

  Raises:
    ValueError: no record has these values.
  """
  found = [
    record
    for record in lines(FOLDER / f'{name}.jsonl')
    if all(record.get(key) == value for key, value in fields.items())
  ]
  if not found:
    raise ValueError(f'{name}.jsonl: no record with {fields}')
  return found


def only(name: str, **fields: Any) -> Record:
  """Reads the one record with these values.

  Raises:
    ValueError: there is none, or more than one.
  """
  found = read(name, **fields)
  if len(found) > 1:
    raise ValueError(f'{name}.jsonl: {len(found)} records with {fields}')
  return found[0]


def problems(record: Record) -> list[str]:
  """Lists what a record lacks; an empty list if it is valid."""
  found = []
  if record.get('kind') not in KINDS:
    found.append(f'kind is {record.get("kind")!r}, not one of {KINDS}')
  if not record.get('commit') and not record.get('source'):
    found.append('neither commit nor source')
  machine = record.get('machine')
  if record.get('kind') == 'measured' and not (machine and machine.get('cpu')):
    found.append('measured, but no machine with a cpu')
  if record.get('kind') == 'quoted' and not record.get('work'):
    found.append('quoted, but no work that it is quoted from')
  return found


def digest(records: Iterable[Record]) -> str:
  """Computes a digest of records: SHA-256 of their JSON, sorted by key."""
  text = json.dumps(list(records), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
