"""Compares latency and size of an integer network and its float twin.

    python -m benchmarks.integer_latency runs/mine/export

The script runs `integer.onnx` and `float32.onnx` in one process. In every round
both run in turn, on one thread and on two, with one image and with sixteen. The
script prints medians of `--rounds`, the median and the 10 to 90 % range of the
rounds' ratios, and file sizes. Without VNNI, which the first line
reports, integers gain less.
"""

import argparse
import pathlib
import statistics
import time

import numpy as np

from benchmarks import common, runtimes

PAIR = ('float32.onnx', 'integer.onnx')


def images_of(folder, batch):
  with np.load(folder / 'selftest.npz') as file:
    images = file['images']
  return np.resize(images, (batch, *images.shape[1:]))


def seconds(run, images, calls):
  start = time.perf_counter()
  for _ in range(calls):
    run(images)
  return (time.perf_counter() - start) / calls


def compare(runtime, folder, threads, batch, rounds):
  """Runs both files in turn; returns seconds per call, [rounds, 2]."""
  images = images_of(folder, batch)
  runs = [runtime(folder / name, threads) for name in PAIR]
  for run in runs:
    seconds(run, images, 20)
  # A round takes a twentieth of a second, so that other load on the machine
  # affects both files alike.
  calls = [max(3, int(0.05 / seconds(run, images, 20))) for run in runs]
  return [
    [seconds(run, images, n) for run, n in zip(runs, calls, strict=True)]
    for _ in range(rounds)
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=pathlib.Path, help='of an export')
  parser.add_argument('--rounds', type=int, default=30)
  args = parser.parse_args()
  missing = [name for name in PAIR if not (args.folder / name).exists()]
  if missing:
    parser.error(f'{args.folder}: no {missing[0]}; expected an export folder')

  flags = pathlib.Path('/proc/cpuinfo').read_text()
  print(
    f'{common.machine()}, VNNI: {"yes" if "vnni" in flags else "no"}; '
    f'load {common.load_average()}'
  )
  sizes = [(args.folder / name).stat().st_size for name in PAIR]
  print(f'file: {sizes[0]} -> {sizes[1]} bytes, x{sizes[0] / sizes[1]:.2f}')
  print('runtime, threads, batch: float -> integer ms; ratio, 10-90 %')
  for name, runtime in runtimes.installed().items():
    for threads in (1, 2):
      for batch in (1, 16):
        pairs = compare(runtime, args.folder, threads, batch, args.rounds)
        before, after = (
          1e3 * statistics.median(t) for t in zip(*pairs, strict=True)
        )
        ratios = [a / b for a, b in pairs]
        low, high = np.quantile(ratios, [0.1, 0.9])
        print(
          f'{name}, {threads}, {batch}: {before:.3f} -> {after:.3f}; '
          f'x{statistics.median(ratios):.2f}, {low:.2f}-{high:.2f}'
        )


if __name__ == '__main__':
  main()
