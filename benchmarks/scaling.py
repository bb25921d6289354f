"""How a step's time and memory grow with batch, classes, network and devices.

    python -m benchmarks.scaling PART

PART is batch, classes, network, devices, imagenet, steady or all.

Each configuration runs in a process of its own, which compiles it once and
discards two steps. Then all processes of a series step in turns, so that other
load on the machine affects all alike. Ratios are to the first row of the same
turn. Beside other work, trust the ratios of CPU time. MB are the compiler's
figures for arguments, results and temporaries on one device; peak MB is the
memory of the process. Weights are random.

`steady` is a whole run of 5,000 small steps, watched from outside. The exit
code is 1 if, from the first thousand to the last, its memory grows by 16 MB and
2 %, or its median step by 20 %.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import common

WARM_UP, TURNS, STEPS_PER_TURN = 2, 5, 2
BASE = {
  'step': 'joint_step',
  'arch': 'resnet8',
  'classes': 10,
  'batch': 64,
  'devices': 1,
  'threads': os.cpu_count(),
  'channels': (128, 64, 32),
}
# Size of XLA's pool. A collective on a fake device keeps a thread until the
# other devices arrive. With fewer threads they can wait for ever.
MANY_THREADS = 16
# By title: what the rows differ in. They are compared with the first row.
SERIES = {
  'batch': {'Batch': [{'batch': n} for n in (16, 64, 256)]},
  'classes': {
    f'Classes, {step}': [{'classes': n, 'step': step} for n in (10, 100, 1000)]
    for step in ('generator_step', 'student_step')
  },
  'network': {'Network': [{'arch': f'resnet{n}'} for n in (8, 20, 56)]},
  'devices': {
    f'Fake devices, {MANY_THREADS} threads after the first row': [
      {'devices': 1},
      *({'devices': n, 'threads': MANY_THREADS} for n in (1, 2, 4, 8)),
    ],
  },
  # A student step takes its images from the pool; a joint step makes them.
  'imagenet': {
    'Step of ResNet-18 at 224 x 224 pixels': [
      {
        'step': step,
        'arch': 'resnet18',
        'classes': 1000,
        'batch': 16,
        'channels': (128, 96, 64, 32, 16, 8),
      }
      for step in ('student_step', 'joint_step')
    ],
  },
}
STEADY_STEPS, LOG_EVERY = 5000, 25
TICKS, PAGE = os.sysconf('SC_CLK_TCK'), os.sysconf('SC_PAGE_SIZE')
GROWTH_MB, GROWTH, SLOWER = 16, 0.02, 0.2  # more of either is a finding


# ------------------------------------------------------------------- children
def serve(spec: dict[str, Any]) -> None:
  """Compiles a step, then times some for each line of input; prints JSON."""
  os.environ['NPROC'] = str(spec['threads'])
  devices = f'--xla_force_host_platform_device_count={spec["devices"]}'
  os.environ['XLA_FLAGS'] = devices
  import jax

  from benchmarks import random_weights
  from clusterq_jax import config as config_lib
  from clusterq_jax.runtime import metrics, roofline
  from clusterq_jax.runtime.session import Session

  config = config_lib.default_config()
  config.schedule.batch_size = spec['batch']
  config.schedule.pool_batches = 1
  config.schedule.procedural_batches = 0
  config.generator.channels = tuple(spec['channels'])
  teacher = random_weights.teacher(spec['arch'], spec['classes'])
  session = Session(config_lib.resolve(config), teacher)
  assert session.mesh.size == spec['devices']
  state, rest = session.init(), session.step_arguments
  step = getattr(session.steps, spec['step'])
  step = session.compile(step, state, *rest, donate=True)

  def timed(count):
    """Returns seconds per step: elapsed, and of all cores."""
    nonlocal state
    elapsed, busy = time.perf_counter(), time.process_time()
    for _ in range(count):
      state, _ = jax.block_until_ready(step(state, *rest))
    elapsed, busy = time.perf_counter() - elapsed, time.process_time() - busy
    return elapsed / count, busy / count

  timed(WARM_UP)
  print('true', flush=True)
  for _ in sys.stdin:
    times = timed(STEPS_PER_TURN)
    memory = roofline.memory(step) / 1e6, metrics.peak_rss_mb()
    print(json.dumps([*times, *memory]), flush=True)


def run_steadily(folder: str) -> None:
  """Runs small joint steps, with log and checkpoints."""
  from benchmarks import random_weights
  from clusterq_jax import config as config_lib
  from clusterq_jax import quantize

  weights = pathlib.Path(folder, 'teacher.safetensors')
  random_weights.write(weights, 'resnet8', num_classes=10)
  config = config_lib.default_config()
  config.teacher.arch, config.teacher.weights = 'resnet8', str(weights)
  config.teacher.image_size = (8, 8)
  config.generator.channels = (8, 8)
  config.checkpoint_every = 500
  config.report.log_every = LOG_EVERY
  s = config.schedule
  s.batch_size, s.joint_steps, s.pool_batches = 8, STEADY_STEPS, 2
  s.warmup_steps = s.generator_steps = s.student_steps = 0
  s.procedural_batches = 0
  quantize(config, f'{folder}/run')


# --------------------------------------------------------------------- parent
def start(argument: str, **kwargs) -> subprocess.Popen:
  """Starts this script with `--child`, in the environment that runs have."""
  child = f'--child={argument}'
  variables = {'JAX_PLATFORMS': 'cpu'}
  return common.start(
    'benchmarks.scaling', child, variables=variables, **kwargs
  )


def answer(child: subprocess.Popen) -> Any:
  line = child.stdout.readline()
  if not line:
    sys.exit(f'error: a measurement ended with {child.wait()}')
  return json.loads(line)


def measure(title: str, rows: list[dict[str, Any]]) -> None:
  """Prints a table of a series."""
  children = []
  for row in rows:
    spec, pipe = json.dumps({**BASE, **row}), subprocess.PIPE
    children.append(start(spec, stdin=pipe, stdout=pipe, text=True))
    answer(children[-1])  # one compiles at a time
  turns: list[list[Any]] = [[] for _ in rows]
  for _, (i, child) in itertools.product(range(TURNS), enumerate(children)):
    print(file=child.stdin, flush=True)
    turns[i].append(answer(child))
  for child in children:
    child.communicate()
  print(f'\n| {title} | s per step | ratio | CPU s | ratio | MB | peak MB |')
  print('|---' * 7 + '|')
  for row, own in zip(rows, turns, strict=True):
    columns = [next(str(value) for value in row.values())]
    for k in (0, 1):
      ratios = [a[k] / b[k] for a, b in zip(own, turns[0], strict=True)]
      columns += [
        common.spread([turn[k] for turn in own]),
        common.spread(ratios),
      ]
    columns += [f'{memory:.0f}' for memory in own[-1][2:]]
    print(f'| {" | ".join(columns)} |', flush=True)


def watch(child: subprocess.Popen, log: pathlib.Path):
  """Returns time and CPU time, s, and memory, MB, at each line of the log."""
  seen: list[tuple[float, float, float]] = []
  process = pathlib.Path('/proc', str(child.pid))
  while child.poll() is None:
    time.sleep(0.005)
    lines = log.read_bytes().count(b'\n') if log.exists() else 0
    if lines > len(seen):
      memory = int((process / 'statm').read_text().split()[1])
      busy = sum(map(int, (process / 'stat').read_text().split()[13:15]))
      now = time.perf_counter(), busy / TICKS, memory * PAGE / 1e6
      seen += [now] * (lines - len(seen))
  if child.returncode or len(seen) != STEADY_STEPS // LOG_EVERY:
    sys.exit(f'error: the run ended with {child.returncode}')
  return seen


def steady() -> bool:
  """Prints time and memory by thousand steps; returns whether they stay."""
  with tempfile.TemporaryDirectory() as folder:
    log = pathlib.Path(folder, 'run', 'metrics.jsonl')
    seen = watch(start(folder), log)
  per_thousand = 1000 // LOG_EVERY
  times, memories = [], []
  print('\n| after steps | ms per step, median | mean | CPU ms | MB |')
  print('|---|---|---|---|---|')
  for end in range(per_thousand, len(seen) + 1, per_thousand):
    # The first few hundred steps fill caches and pools.
    part = seen[max(end - per_thousand, 300 // LOG_EVERY) - 1 : end]
    ms = [
      [1e3 * (b[k] - a[k]) / LOG_EVERY for a, b in itertools.pairwise(part)]
      for k in (0, 1)
    ]
    times.append(statistics.median(ms[0]))
    memories.append(part[-1][2])
    print(
      f'| {end * LOG_EVERY} | {times[-1]:.2f} | {statistics.mean(ms[0]):.2f} | '
      f'{statistics.mean(ms[1]):.2f} | {memories[-1]:.1f} |'
    )
  more = memories[-1] - memories[0]
  slower = times[-1] / times[0] - 1
  grown = more > max(GROWTH_MB, GROWTH * memories[0]) or slower > SLOWER
  print(
    f'from the first thousand to the last: {more:+.1f} MB, step time '
    f'{100 * slower:+.1f} %: {"GROWS" if grown else "steady"}'
  )
  return not grown


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('part', nargs='?', choices=[*SERIES, 'steady', 'all'])
  parser.add_argument('--child', help=argparse.SUPPRESS)
  args = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if args.child:
    if args.child.startswith('{'):
      serve(json.loads(args.child))
    else:
      run_steadily(args.child)
    return 0
  if args.part is None:
    parser.error('expected a part')
  print(f'{os.cpu_count()} cores, load average {common.load_average()}')
  for part, tables in SERIES.items():
    if args.part in (part, 'all'):
      for title, rows in tables.items():
        measure(title, rows)
  return int(args.part in ('steady', 'all') and not steady())


if __name__ == '__main__':
  sys.exit(main())
