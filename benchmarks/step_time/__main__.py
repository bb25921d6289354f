"""Seconds per joint and per student step: this project and PyTorch.

    python -m benchmarks.step_time [--step=joint|student|both] [--check]

`torch_step.py` is the same work in PyTorch, eager and with torch.compile.
Weights, centroids and pool are random, because the time does not depend on
them. The joint step is the paper's with learned ranges and Adam; it augments
every batch. The student step is that of the short recipe.

Each side runs in processes of its own, in turns. A process discards two steps
and times `--steps`. There are `--rounds` processes per side. Before its rounds,
each side of PyTorch runs once in either memory format and keeps the faster. The
script prints medians with ranges, and the ratios of the rounds' medians to
those of PyTorch's faster side. No step time contains the compilation. Beside
other work PyTorch loses more time than JAX.

`--check` runs one step of all from the same parameters and random numbers, in
float64, and compares losses, centroids and gradients. It ends with exit code 1
where they differ. Give it batches of 24 images or more: the class terms need an
image that the teacher classifies correctly.

`--record` appends a line for each step and batch to records/step_time.jsonl.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata, util
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common, records
from benchmarks.step_time.setting import CHANNELS

WARM_UP = 2
TOLERANCE = 1e-3  # of --check, relative
FILE = records.FOLDER / 'step_time.jsonl'
STEPS, TORCH = ('joint', 'student'), ('eager', 'compile')


class Case(NamedTuple):
  """What is measured.

  Attributes:
    step: 'joint' or 'student'.
    batch: images per step.
    generator: of the joint step; the student step has none.
  """

  step: str
  batch: int
  generator: str | None = None

  def __str__(self):
    of = f' ({self.generator} generator)' if self.generator else ''
    return f'{self.step} step{of}, batch {self.batch}'


class Side(NamedTuple):
  """A framework and how it runs.

  Attributes:
    name: 'jax', or PyTorch's 'eager' or 'compile'.
    channels_last: memory format of PyTorch's images and kernels.
  """

  name: str
  channels_last: bool = False

  @property
  def layout(self) -> str:
    return 'channels_last' if self.channels_last else 'contiguous'

  def __str__(self):
    return self.name + f' {self.layout}' * (self.name != 'jax')


class Timing(NamedTuple):
  """What a process reports, in seconds."""

  steps: list[float]
  compilation: float

  @property
  def median(self) -> float:
    return statistics.median(self.steps)


# ------------------------------------------------------------------- children
#
# A process that times JAX never imports torch.


def _torch_step(args, side: Side, arrays, fixed=None):
  import torch

  from benchmarks.step_time import torch_step

  torch.set_num_threads(args.threads)
  torch.set_default_dtype(torch.float64 if args.check else torch.float32)
  if fixed is not None:  # torch takes int64 only as index
    fixed = tuple(
      torch.tensor(a.astype(np.int64) if a.dtype == np.int32 else a)
      for a in fixed
    )
  step = {'joint': torch_step.JointStep, 'student': torch_step.StudentStep}
  return step[args.step](
    arrays, args.batch_size[0], side.name, side.channels_last, fixed
  )


def _compared(args, ours, plain, expected, found):
  """Yields name, JAX's and PyTorch's value of all that must be equal."""
  from benchmarks.step_time import jax_step, torch_networks

  for name, value in found.items():
    yield name, expected[name], value
  optimizers = [ours.state.student_opt]
  trained = {
    'student': ('params/', 0.9, plain.params),
    'quantizer': ('quant/', 0.9, plain.quant),
  }
  if args.step == 'joint':
    layers = zip(ours.state.centroids.layers, plain.centroids, strict=True)
    for i, (a, b) in enumerate(layers):
      yield f'centroids/{i}', np.stack(a), b
    optimizers.append(ours.state.generator_opt)
    trained['generator'] = '', 0.5, plain.generator
  else:
    images = plain.moved.permute(0, 2, 3, 1)
    yield 'moved images', ours.state.moved, images
  # Adam's first moment after one step is the gradient times 1 - decay.
  mu = {
    name.partition('/mu/')[2]: value
    for state in optimizers
    for name, value in jax_step.flatten(state).items()
    if '/mu/' in name
  }
  for name, (prefix, decay, own) in trained.items():
    a = [torch_networks.from_jax(f'/{k}', mu[prefix + k]).ravel() for k in own]
    b = [v.grad.numpy().ravel() for v in own.values()]
    yield (
      f'gradient/{name}',
      np.concatenate(a) / (1 - decay),
      np.concatenate(b),
    )


def check(args) -> int:
  """Runs one step of all from the same state; returns 1 where they differ.

  In float64: in float32 the last bit decides a few codes of the quantizers,
  and each of them the codes after it.
  """
  from benchmarks.step_time import jax_step

  ours = jax_step.JaxStep(args)
  fixed, expected = ours.draws(), ours()
  if not expected.get('generator/sfda', True):
    print('the teacher classifies no image correctly: try another --seed')
    return 1
  different = False
  for name, channels_last in itertools.product(args.torch, (False, True)):
    side = Side(name, channels_last)
    print(f'{cases(args)[0]}, jax and {side}:')
    plain, worst = _torch_step(args, side, ours.inputs, fixed), 0.0
    for what, *values in _compared(args, ours, plain, expected, plain()):
      a, b = (np.asarray(v, np.float64) for v in values)
      size = np.linalg.norm(a)
      error = np.linalg.norm(a - b) / np.maximum(size, TOLERANCE)
      worst = np.maximum(worst, error)
      sizes = f'jax {size:.6g}, torch {np.linalg.norm(b):.6g}'
      print(f'  {what:22s} {sizes}, relative {error:.1e}')
    same = bool(worst <= TOLERANCE)
    print('  the same work' if same else '  DIFFERS')
    different |= not same
  return int(different)


def child(args) -> int:
  """Times one side; prints JSON."""
  if args.child == 'jax':
    from benchmarks.step_time import jax_step

    step = jax_step.JaxStep(args)
    np.savez(args.inputs, **step.inputs)
  else:
    side = Side(args.child, args.channels_last)
    step = _torch_step(args, side, dict(np.load(args.inputs)))
  seconds = []
  for _ in range(WARM_UP + args.steps):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
  steps = seconds[WARM_UP:]
  # torch compiles in the first step.
  first = seconds[0] - statistics.median(steps)
  print(json.dumps([steps, getattr(step, 'compile_s', first)]))
  return 0


# --------------------------------------------------------------------- parent
def cases(args) -> list[Case]:
  """Returns what is to be measured."""
  steps = STEPS if args.step == 'both' else [args.step]
  generators = CHANNELS if args.generator == 'both' else [args.generator]
  return [
    Case(step, batch, generator)
    for step in steps
    for generator in (generators if step == 'joint' else [None])
    for batch in args.batch_size
  ]


def start(name: str, case: Case, *arguments: str, **env: str):
  """Starts a process of this script for one case."""
  own = [f'--child={name}', f'--step={case.step}', *arguments]
  own.append(f'--batch_size={case.batch}')
  if case.generator:
    own.append(f'--generator={case.generator}')
  return common.start(
    'benchmarks.step_time',
    *sys.argv[1:],
    *own,
    variables={'JAX_PLATFORMS': 'cpu', **env},
    stdout=None if name == 'check' else subprocess.PIPE,
  )


def timed(case: Case, side: Side, folder: str, note: str) -> Timing:
  """Times a side in a process of its own.

  Args:
    case: what is measured.
    side: framework and memory format.
    folder: where the first process of JAX leaves what the others read.
    note: printed with the result.
  """
  arguments = [f'--inputs={folder}/inputs.npz']
  arguments += ['--channels_last'] * side.channels_last
  # Empty before the side's first process.
  cache = f'{folder}/{side.name}_{side.layout}'
  process = start(side.name, case, *arguments, TORCHINDUCTOR_CACHE_DIR=cache)
  output, _ = process.communicate()
  if process.returncode:
    sys.exit(f'error: the {side} process ended with {process.returncode}')
  timing = Timing(*json.loads(output.splitlines()[-1]))
  print(f'  {case}, {note}, {side}: {common.spread(timing.steps)}')
  return timing


def measure(args, case: Case) -> dict[str, Any]:
  """Times all sides of a case in turns; prints and returns the result."""
  with tempfile.TemporaryDirectory() as folder:
    jax = Side('jax')
    rounds = {jax: [timed(case, jax, folder, 'round 1')]}
    first = {'jax': rounds[jax][0].compilation}
    for name in args.torch:
      trials = {
        side: timed(case, side, folder, 'memory format')
        for side in (Side(name, False), Side(name, True))
      }
      side = min(trials, key=lambda side: trials[side].median)
      # Only the first process of a side compiles everything.
      first[name] = trials[side].compilation
      rounds[side] = [timed(case, side, folder, 'round 1')]
    for i in range(2, args.rounds + 1):
      for side, timings in rounds.items():
        timings.append(timed(case, side, folder, f'round {i}'))
  medians = {side: [t.median for t in own] for side, own in rounds.items()}
  ours, *others = medians
  faster = min(others, key=lambda side: statistics.median(medians[side]))
  ratios = [a / b for a, b in zip(medians[ours], medians[faster], strict=True)]
  # A side that could not run has None, for the page of results.
  seconds = dict.fromkeys(('jax', *TORCH))
  for side, timings in rounds.items():
    steps = [s for timing in timings for s in timing.steps]
    seconds[side.name] = statistics.median(steps)
    print(f'{case}: {side} {common.spread(steps)} s/step')
  compilation = {name: first.get(name) for name in ('jax', 'compile')}
  for name, own in compilation.items():
    if own is not None:
      print(f'{case}: {name} compiles in {own:.0f} s')
  return {
    **case._asdict(),
    'rounds': args.rounds,
    's': seconds,
    'compilation_s': compilation,
    'channels_last': {side.name: side.channels_last for side in others},
    'faster': faster.name,
    'ratio': [statistics.median(ratios), min(ratios), max(ratios)],
  }


def summary(result: dict[str, Any]) -> str:
  """Writes the result of a case in one line."""
  case = Case(*(result[field] for field in Case._fields))
  ratio, low, high = result['ratio']
  return f'{case}: jax / {result["faster"]} {ratio:.3f} ({low:.3f}-{high:.3f})'


def _parse():
  parser = argparse.ArgumentParser(
    prog='benchmarks.step_time', description=__doc__.splitlines()[0]
  )
  add = parser.add_argument
  add('--step', default='both', choices=[*STEPS, 'both'])
  add('--generator', default='slim', choices=[*CHANNELS, 'both'])
  add('--batch_size', type=int, nargs='+', default=[64, 128])
  add('--torch', nargs='+', default=TORCH, choices=TORCH)
  add('--steps', type=int, default=10, help='timed ones, per round')
  add('--rounds', type=int, default=3, help='processes per side')
  add('--threads', type=int, default=len(os.sched_getaffinity(0)))
  add('--seed', type=int, default=0)
  add('--check', action='store_true', help='compare results, time nothing')
  add('--record', action='store_true', help=f'append to {FILE.name}')
  add('--child', help=argparse.SUPPRESS)
  add('--inputs', help=argparse.SUPPRESS)
  add('--channels_last', action='store_true', help=argparse.SUPPRESS)
  return parser.parse_args()


def _without_compiler(names) -> list[str]:
  """Returns the sides of PyTorch that can run here; says which cannot."""
  compiler = os.environ.get('CXX', 'g++')
  if 'compile' not in names or shutil.which(compiler):
    return list(names)
  print(f'compile is left out: torch.compile needs a C++ compiler ({compiler})')
  return [name for name in names if name != 'compile']


def main() -> int:
  args = _parse()
  if args.child == 'check' or not (args.child or args.check):
    args.torch = _without_compiler(args.torch)
  if args.child:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: args.threads])  # for XLA
    if args.check:
      os.environ['JAX_ENABLE_X64'] = '1'
    return check(args) if args.check else child(args)
  if util.find_spec('torch') is None:
    print('error: PyTorch is missing: pip install torch', file=sys.stderr)
    return 2
  if args.check:
    return max([start('check', case).wait() for case in cases(args)])
  if not args.torch:
    return 2
  versions = {name: metadata.version(name) for name in ('jax', 'torch')}
  provenance = common.provenance()
  machine = provenance['machine'] = provenance['machine'] | {
    'cores': args.threads
  }
  print(f'{machine}, {versions}')
  if machine['load'] > 0.5:
    print('warning: the machine is busy; the ratio is not to be trusted')
  results = [measure(args, case) for case in cases(args)]
  for result in results:
    print(summary(result))
  if args.record:
    records.append(
      FILE,
      *({'group': 'torch', **r, **versions, **provenance} for r in results),
    )
  return 0


if __name__ == '__main__':
  sys.stdout.reconfigure(line_buffering=True)
  sys.exit(main())
