"""Compares latency and size of an integer network and its float twin.

    python -m benchmarks.integer_latency runs/mine/export

The script runs `integer.onnx` and `float32.onnx` in one process. In every round
both run in turn, on one thread and on two, with one image and with sixteen. The
script prints medians of `--rounds`, the median and the 10 to 90 % range of the
rounds' ratios, and file sizes. Without VNNI, which the first line
reports, integers gain less.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import numpy as np

PAIR = ('float32.onnx', 'integer.onnx')


def onnx_runtime(file, threads):
  """Returns images -> logits."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.inter_op_num_threads = 1
  session = onnxruntime.InferenceSession(
    str(file), options, providers=['CPUExecutionProvider']
  )
  return lambda images: session.run(None, {'images': images})[0]


def openvino(file, threads):
  """Returns images -> logits; float32 stays float32."""
  import openvino as ov

  settings = {
    'INFERENCE_PRECISION_HINT': 'f32',
    'INFERENCE_NUM_THREADS': threads,
    'NUM_STREAMS': 1,
  }
  compiled = ov.Core().compile_model(str(file), 'CPU', settings)
  return lambda images: compiled(images)[0]


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

  import onnxruntime

  runtimes = {f'ONNX Runtime {onnxruntime.__version__}': onnx_runtime}
  try:
    import openvino as ov

    runtimes[f'OpenVINO {ov.__version__.split("-")[0]}'] = openvino
  except ImportError:
    print('OpenVINO is not installed: left out')
  import onnx

  properties = onnx.load(args.folder / PAIR[1]).metadata_props
  facts = {p.key: json.loads(p.value) for p in properties}
  bits, arch = facts['bits'], facts['config']['teacher']['arch']
  flags = pathlib.Path('/proc/cpuinfo').read_text()
  print(
    f'{arch} W{bits["weights"]}A{bits["activations"]}; {os.cpu_count()} CPUs, '
    f'VNNI: {"yes" if "vnni" in flags else "no"}; load {os.getloadavg()[0]:.2f}'
  )
  sizes = [(args.folder / name).stat().st_size for name in PAIR]
  print(f'file: {sizes[0]} -> {sizes[1]} bytes, x{sizes[0] / sizes[1]:.2f}')
  print('runtime, threads, batch: float -> integer ms; ratio, 10-90 %')
  for name, runtime in runtimes.items():
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
