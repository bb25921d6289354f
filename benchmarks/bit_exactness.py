"""Compares runtimes with the integer evaluation in JAX, image by image.

    python -m benchmarks.bit_exactness runs/mine [--images=FILE.npz]

Runs `export/integer.onnx` of a workdir in ONNX Runtime, in both of its kernel
modes, and in OpenVINO where it is installed. The script counts the images
whose logits are equal in every bit. It also prints accuracy and agreement of
the fake-quantized, the integer and the runtime's network. By default it uses
Fashion-MNIST's test set.
"""

import argparse
import pathlib

import jax
import numpy as np

from benchmarks import runtimes
from clusterq_jax import data, errors, load_student
from clusterq_jax.runtime import evaluation


def in_batches(run, images, size=250):
  """Returns logits [N, K] of images [N, ...], in batches of this size."""
  parts = [images[i : i + size] for i in range(0, len(images), size)]
  return np.concatenate([np.asarray(run(part)) for part in parts])


def runs(file):
  """Yields name, and images -> logits, of each runtime and kernel mode."""
  for name, runtime in runtimes.installed().items():
    if runtime is runtimes.onnx_runtime:
      for mode in ('0', '1'):
        run = runtime(file, mode=mode)
        yield f'{name}, x64quantprecision={mode}', run
    else:
      yield name, runtime(file)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument(
    '--images', help='npz of images and labels; Fashion-MNIST test unless given'
  )
  args = parser.parse_args()
  try:
    student = load_student(args.workdir)
    if args.images:
      images = data.read_npz(args.images)
    else:
      images = data.read_fashion_mnist(data.ASSETS, 't10k')
    folded = student.integer()
  except errors.InputError as e:
    parser.error(str(e))
  file = args.workdir / 'export' / 'integer.onnx'
  if not file.exists():
    parser.error(f'{file}: missing; expected what --mode=export writes')

  def top1(classes):
    return evaluation.percent(classes == images.labels)

  ours = in_batches(jax.jit(folded.logits), images.images)
  classes = ours.argmax(-1)
  fake = in_batches(student.logits, images.images).argmax(-1)
  print(
    f'{args.workdir}, {len(ours)} images: top-1 {top1(fake):.2f} fake-quant, '
    f'{top1(classes):.2f} integer; they agree on '
    f'{evaluation.percent(fake == classes):.2f} %'
  )
  for name, run in runs(file):
    theirs = in_batches(run, images.images)
    same = np.all(ours == theirs, -1)
    agree = evaluation.percent(theirs.argmax(-1) == classes)
    print(
      f'{name}: logits equal on {same.sum()} of {len(same)} images, largest '
      f'difference {np.abs(ours - theirs).max():.3g}; same class on '
      f'{agree:.2f} %; top-1 {top1(theirs.argmax(-1)):.2f}'
    )


if __name__ == '__main__':
  main()
