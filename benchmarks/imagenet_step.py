"""Seconds and memory of a joint step at 224x224, and of one with images given.

    python -m benchmarks.imagenet_step WEIGHTS --config=configs/resnet18.py \
        [--channels=128,96,64,32,16,8] [--batch_size=16] [--steps=3]

The joint step makes its images (generator forward and backward, teacher
backward); a student step takes them from the pool. Each is compiled and run in
a process of its own. WEIGHTS: a file for the config's network, say one of
random_weights.py. --channels: another generator than the config's.
"""

import argparse
import multiprocessing
import os
import runpy
import statistics
import time

STEPS = ('student_step', 'joint_step')


def measure(name: str, args, queue) -> None:
  """Puts (seconds per step, to compile, peak resident MB) into the queue."""
  import jax

  from clusterq_jax import sharding
  from clusterq_jax.modes import train
  from clusterq_jax.runtime import metrics
  from clusterq_jax.runtime import session as experiment

  config = runpy.run_path(args.config)['get_config']()
  config.teacher.weights = args.weights
  config.schedule.batch_size = args.batch_size
  config.schedule.pool_batches = 1
  if args.channels:
    config.generator.channels = tuple(map(int, args.channels.split(',')))
  teacher = experiment.load_teacher(config)
  steps = experiment.make_steps(config, teacher)
  replicated = sharding.replicated(steps.mesh)
  variables, key = jax.device_put(
    (teacher.variables, jax.random.key(0)), replicated
  )
  state = jax.jit(steps.init, out_shardings=replicated)(key, variables)
  compiler, seconds = train.Compiler(steps.mesh), []
  program = compiler(getattr(steps, name), state, variables, key, donate=True)
  for _ in range(args.steps + 1):  # the first one touches new memory
    start = time.perf_counter()
    state, _ = jax.block_until_ready(program(state, variables, key))
    seconds.append(time.perf_counter() - start)
  queue.put((seconds[1:], compiler.seconds, metrics.peak_rss_mb()))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('weights')
  parser.add_argument('--config', required=True)
  parser.add_argument('--channels')
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--steps', type=int, default=3)
  args = parser.parse_args()
  print(
    f'{args.config}, batch {args.batch_size}, load {os.getloadavg()[0]:.2f}'
  )
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
      f'{name}: {medians[-1]:.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), '
      f'compiled in {compiling:.0f} s, peak {memory / 1e3:.2f} GB'
    )
  print(f'joint / given: x{medians[1] / medians[0]:.2f}')


if __name__ == '__main__':
  main()
