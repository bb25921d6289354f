"""Imports networks of torchvision, timm and pytorchcv, down to integer files.

    python -m benchmarks.zoo [--names NAME ...] [--stages=import] [--limit=20]

The names stand in zoo.txt. Each network runs in a process of its own, which is
stopped after 3 minutes or at 8 GB; benchmarks/zoo_stages.py says what it does.
It leaves one line in records/zoo.jsonl. A benchmark that is started again skips
the networks whose line has the asked stages, or says why they stopped. It needs
torch, onnxruntime, and the libraries of the networks:

    pip install torch torchvision timm pytorchcv
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import common, records
from benchmarks.records import Record

LIST = pathlib.Path(__file__).with_suffix('.txt')
RECORDS = records.FOLDER / 'zoo.jsonl'
# What a process does, in this order; `--stages` names the last one.
STAGES = ('export', 'load', 'parity', 'student', 'integer', 'latency')
LAST = {'import': 'parity', 'student': 'student', 'integer': 'latency'}
# Largest difference from torch, relative to the largest logit.
PARITY = 1e-4
# Every process is a copy of one that has imported the libraries already.
CONTEXT = multiprocessing.get_context('forkserver')
_LIBRARIES = (
  'benchmarks.zoo_networks',
  'benchmarks.zoo_stages',
  'timm',
  'torchvision.models',
  'pytorchcv.model_provider',
  'torch._dynamo',
)
_POLL_S = 0.1


class Network(NamedTuple):
  """One line of zoo.txt.

  Attributes:
    name: 'SOURCE:NAME'.
    side: height and width of the input in pixels.
    found: what a prototype of the importer found.
  """

  name: str
  side: int
  found: str


class Limits(NamedTuple):
  """What a process may take: wall-clock seconds, and resident memory in MB."""

  seconds: float = 180
  megabytes: float = 8000


def networks(file: pathlib.Path = LIST) -> list[Network]:
  """Reads the list of networks."""
  lines = file.read_text().splitlines()
  rows = [line.split('\t') for line in lines if not line.startswith('#')]
  return [Network(name, int(side), found) for name, side, found in rows]


def peak_megabytes(process: int) -> float:
  """Returns the largest resident memory that a process has had so far."""
  try:
    status = pathlib.Path(f'/proc/{process}/status').read_text()
  except OSError:
    return 0.0
  values = [x.split()[1] for x in status.splitlines() if x.startswith('VmHWM')]
  return int(values[0]) / 1024 if values else 0.0  # a zombie has none


def supervise(
  target: Callable[..., None], args: tuple[Any, ...], limits: Limits
) -> Record:
  """Runs a function in a process of its own, and stops it at its limits.

  The function gets the path of a file as its last argument. It adds a line of
  JSON to the file when a stage begins, {'stage': NAME}, and when it has found
  something.

  Args:
    target: the function, at the top of a module.
    args: its other arguments.
    limits: when to stop it.

  Returns:
    What it reported, with `stage`, the last one that began, `wall_s` and
    `peak_mb`. If it did not end by itself and well, also `reason`.
  """
  peak, reason = 0.0, ''
  with tempfile.TemporaryDirectory() as folder:
    report, log = (pathlib.Path(folder) / n for n in ('report', 'log'))
    process = CONTEXT.Process(target=_enter, args=(log, target, *args, report))
    process.start()
    start = time.monotonic()
    try:
      while process.is_alive() and not reason:
        process.join(_POLL_S)
        peak = max(peak, peak_megabytes(process.pid))
        if peak > limits.megabytes:
          reason = f'stopped at {limits.megabytes:g} MB'
        elif time.monotonic() - start > limits.seconds:
          reason = f'stopped after {limits.seconds:g} s'
    finally:
      process.kill()
      process.join()
    wall, code = time.monotonic() - start, process.exitcode
    if code and not reason:
      lines = log.read_text(errors='replace').strip().splitlines()
      said = lines[-1] if lines and code > 0 else f'exit code {code}'
      reason = f'killed by {signal.Signals(-code).name}' if code < 0 else said
    found: Record = {'stage': None}
    for line in report.read_text().splitlines() if report.exists() else []:
      try:
        found |= json.loads(line)
      except ValueError:  # stopped while it wrote
        break
  found |= {'reason': reason} if reason else {}
  return {**found, 'wall_s': round(wall, 1), 'peak_mb': round(peak)}


def _enter(log: pathlib.Path, target: Callable[..., None], *args: Any) -> None:
  """Calls a function whose prints, and those of libraries, go to a file."""
  with log.open('w') as file:
    for stream in (1, 2):
      os.dup2(file.fileno(), stream)
  target(*args)


def has(record: Record, stage: str) -> bool:
  """Tells whether a network needs no further run to know about a stage."""
  if record.get('reason'):
    return True
  return STAGES.index(record['stage']) >= STAGES.index(stage)


def outcome(record: Record) -> str:
  """Says how far a network came, in a few words."""
  if record.get('refused'):
    return 'refused'
  if record.get('reason'):
    return f'fails in {record["stage"]}'
  if not record['parity'] <= PARITY:  # also if it is NaN
    return 'no parity'
  if 'exact' not in record:
    return 'imported' if record['stage'] == 'parity' else 'student'
  return 'exact' if record['exact'] == record['images'] else 'not exact'


def replace(file: pathlib.Path, record: Record) -> None:
  """Writes a record in the place of an older one of the same network."""
  kept = [r for r in records.lines(file) if r['name'] != record['name']]
  new = file.with_suffix('.new')
  new.unlink(missing_ok=True)
  records.append(new, *sorted([*kept, record], key=lambda r: r['name']))
  new.replace(file)


def run(*args: Any) -> None:
  """Runs the stages of one network; see `zoo_stages.run`."""
  # Not above: this module and its tests need neither JAX nor torch.
  from benchmarks import zoo_stages

  zoo_stages.run(*args)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--names', nargs='+', metavar='NAME', help='also if they have a line')
  add('--stages', choices=LAST, default='integer', help='the last one to run')
  add('--limit', type=int, help='number of networks to run')
  add('--again', action='store_true', help='also those whose line has a reason')
  add('--seconds', type=float, default=Limits().seconds)
  add('--programs', type=pathlib.Path, default=common.ROOT / 'runs' / 'zoo')
  add('--records', type=pathlib.Path, default=RECORDS)
  args = parser.parse_args()
  todo = {network.name: network for network in networks()}
  if args.names:
    unknown = set(args.names) - todo.keys()
    if unknown:
      parser.error(f'--names: {sorted(unknown)} not in {LIST}')
    todo = {name: todo[name] for name in args.names}
  else:
    for record in records.lines(args.records):
      again = args.again and record.get('reason') and not record.get('refused')
      if has(record, LAST[args.stages]) and not again:
        todo.pop(record['name'], None)
  CONTEXT.set_forkserver_preload(list(_LIBRARIES))
  stages = STAGES[: STAGES.index(LAST[args.stages]) + 1]
  for name, side, _ in list(todo.values())[: args.limit]:
    work = name, side, stages, args.programs.resolve()
    found = supervise(run, work, Limits(args.seconds))
    record = {'name': name, 'side': side, **found, **common.provenance()}
    replace(args.records, record)
    print(
      f'{name}: {outcome(record)}, {record["wall_s"]} s, '
      f'{record["peak_mb"]} MB {record.get("reason", "")}',
      flush=True,
    )
  return 0


if __name__ == '__main__':
  # The process of a network ends with this one, also when it is told to stop.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit(130)
