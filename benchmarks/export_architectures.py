"""Checks that each architecture exports what the integer evaluation computes.

    python -m benchmarks.export_architectures [ARCH ...] [--bits=8]

Weights are random; ranges come from two procedural images. The script checks on
procedural and noise images that ONNX Runtime's logits equal the integer
evaluation, in both kernel modes, and that its optimized graph computes every
convolution in integers. The exit code is 1 if one of these fails.
"""

import argparse
import pathlib
import tempfile
from collections import Counter

import jax
import numpy as np
import onnx
import onnxruntime

from benchmarks import bit_exactness, random_weights
from clusterq_jax.deploy import fold as folding
from clusterq_jax.deploy import onnx_graph as onnx_layers
from clusterq_jax.layers import fake_quant
from clusterq_jax.method import procedural
from clusterq_jax.models import registry
from clusterq_jax.models.graph import trace
from clusterq_jax.quant import plan as plan_lib

ARCHITECTURES = (
  'resnet18',
  'resnet34',
  'resnet50',
  'mobilenet_v2',
  *(f'efficientnet_lite{i}' for i in range(5)),
)
CLASSES = 1000
_CALIBRATION = 2  # images; ranges need no accuracy


def fold(arch: str, bits: int):
  """Returns the integer network, its graph, input and number of weights."""
  variables, prep = random_weights.make(arch, CLASSES, seed=0)
  build = registry.builder(arch, num_classes=CLASSES)
  graph = trace(build)
  chosen = plan_lib.Bits(bits, bits, bits, bits, 'integer')
  plan = plan_lib.make_plan(graph, chosen, False, prep.limit)
  network = build(fake_quant.layer_set(plan, calibrate=True))

  @jax.jit
  def calibrate(variables, key):
    x = procedural.dead_leaves(key, _CALIBRATION, prep.shape)
    return network.apply(variables, x, mutable=['quant'])[1]

  quant = calibrate(variables, jax.random.key(0))
  student = jax.device_get({**variables, **quant})
  weights = sum(a.size for a in jax.tree.leaves(variables['params']))
  return folding.fold(graph, plan, student, prep), graph, prep, weights


def optimised(file: pathlib.Path) -> Counter[str]:
  """Counts the operators of the graph that ONNX Runtime makes of a file."""
  options = onnxruntime.SessionOptions()
  options.optimized_model_filepath = str(file.with_suffix('.optimised'))
  onnxruntime.InferenceSession(
    str(file), options, providers=['CPUExecutionProvider']
  )
  graph = onnx.load(options.optimized_model_filepath).graph
  return Counter(node.op_type for node in graph.node)


def check(arch: str, bits: int, count: int) -> bool:
  """Prints a line of what was found; returns whether all is right."""
  folded, graph, prep, weights = fold(arch, bits)
  draw = np.random.RandomState(1)
  x = procedural.dead_leaves(jax.random.key(1), count, prep.shape)
  noise = draw.randint(0, 256, (count, *prep.shape), np.uint8)
  # Half of the images are noise, in which every value occurs.
  half = count // 2
  images = np.concatenate([np.asarray(prep.to_pixels(x))[half:], noise[:half]])
  logits = bit_exactness.in_batches(jax.jit(folded.logits), images, 16)
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 'integer.onnx'
    model = onnx_layers.integer_model(folded, {})
    file.write_bytes(model.SerializeToString())
    size = file.stat().st_size
    operators = optimised(file)
    convolutions = operators['QLinearConv'], operators['Conv']
    exact = []
    for _, run in bit_exactness.runs(file):
      theirs = bit_exactness.in_batches(run, images, 16)
      exact.append(int(np.all(theirs == logits, -1).sum()))
  different = len(np.unique(logits, axis=0))
  wanted = len(graph.weighted) - 1  # without the classifier
  print(
    f'{arch} {prep.image_size[0]} pixels, W{bits}A{bits}: logits equal on '
    f'{" and ".join(map(str, exact))} of {count} images ({different} different '
    f'answers); QLinearConv {convolutions[0]}, Conv {convolutions[1]}, of '
    f'{wanted} convolutions; '
    f'{size / 1e6:.2f} MB, 1/{4 * weights / size:.2f} of float32',
    flush=True,
  )
  return set(exact[:2]) == {count} and convolutions == (wanted, 0)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('archs', nargs='*', metavar='ARCH', default=ARCHITECTURES)
  parser.add_argument('--bits', type=int, default=8)
  parser.add_argument('--images', type=int, default=64)
  args = parser.parse_args()
  return 1 - all([check(a, args.bits, args.images) for a in args.archs])


if __name__ == '__main__':
  raise SystemExit(main())
