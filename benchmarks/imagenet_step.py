"""Seconds and memory of a joint step and a student step at 224 x 224 pixels.

    python -m benchmarks.imagenet_step WEIGHTS --config=configs/resnet18.py \
        [--channels=128,96,64,32,16,8] [--batch_size=16] [--steps=3]

The joint step makes its images (generator forward and backward, teacher
backward). A student step takes them from the pool. Each is compiled and run in
a process of its own. WEIGHTS is a file for the config's network, for example
from random_weights.py. --channels replaces the config's generator.
"""

import argparse
import multiprocessing
import runpy
import statistics
import time

from benchmarks import common

STEPS = ('student_step', 'joint_step')


def measure(name: str, args, queue) -> None:
  """Puts (seconds per step, to compile, peak resident MB) into the queue."""
  import jax

  from clusterq_jax import config as config_lib
  from clusterq_jax.runtime import metrics
  from clusterq_jax.runtime.session import Session

  config = runpy.run_path(args.config)['get_config']()
  config.teacher.weights = args.weights
  config.schedule.batch_size = args.batch_size
  config.schedule.pool_batches = 1
  if args.channels:
    config.generator.channels = tuple(map(int, args.channels.split(',')))
  session, seconds = Session(config_lib.resolve(config)), []
  state, rest = session.init(), session.step_arguments
  step = getattr(session.steps, name)
  program = session.compile(step, state, *rest, donate=True)
  for _ in range(args.steps + 1):  # the first one touches new memory
    start = time.perf_counter()
    state, _ = jax.block_until_ready(program(state, *rest))
    seconds.append(time.perf_counter() - start)
  queue.put((seconds[1:], session.compile.seconds, metrics.peak_rss_mb()))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('weights')
  parser.add_argument('--config', required=True)
  parser.add_argument('--channels')
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--steps', type=int, default=3)
  args = parser.parse_args()
  print(f'{args.config}, batch {args.batch_size}, load {common.load_average()}')
  context = multiprocessing.get_context('spawn')
  medians = []
  for name in STEPS:
    queue = context.Queue()
    process = context.Process(target=measure, args=(name, args, queue))
    process.start()
    seconds, compiling, memory = queue.get()
    process.join()
    medians.append(statistics.median(seconds))
    print(
      f'{name}: {common.spread(seconds)} s, compiled in {compiling:.0f} s, '
      f'peak {memory / 1e3:.2f} GB'
    )
  print(f'joint step / student step: x{medians[1] / medians[0]:.2f}')


if __name__ == '__main__':
  main()
