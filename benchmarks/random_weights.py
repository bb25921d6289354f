"""Makes random weights for a network.

    python -m benchmarks.random_weights --arch=resnet18 --output=F.safetensors

Kernels, gains and biases are random. BatchNorm statistics are those of noise
images, so that activations keep their scale through the network, as with
trained weights. They serve speed, size and bit-exactness, which do not depend
on accuracy.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax import weights
from clusterq_jax.layers import float_layers
from clusterq_jax.models import registry
from clusterq_jax.models.graph import trace
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.ops.moments import batch_statistics
from clusterq_jax.weights import teacher as teacher_lib

_IMAGES = 8
# For networks without a usual input.
_SMALL = {'image_size': (32, 32), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}


def make(arch: str, num_classes: int, seed: int):
  """Returns variables of a network, and its usual input."""
  build = registry.builder(arch, num_classes=num_classes)
  prep = Preprocessing(**(registry.architecture(arch).preprocessing or _SMALL))
  random = np.random.RandomState(seed)
  network = build(float_layers.layer_set(train=True, tap=True))
  noise = random.randint(0, 256, (_IMAGES, *prep.shape), np.uint8)
  x = prep.normalize(jnp.asarray(noise))

  def draw(path, leaf):
    if path[-1].key == 'kernel':
      deviation = np.sqrt(2 / np.prod(leaf.shape[:-1]))
      return np.float32(random.randn(*leaf.shape) * deviation)
    low, high = {'scale': (0.5, 1.5), 'var': (1, 1)}.get(
      path[-1].key, (-0.2, 0.2)
    )
    return random.uniform(low, high, leaf.shape).astype(np.float32)

  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  variables = {
    key: jax.tree_util.tree_map_with_path(draw, shapes[key])
    for key in ('params', 'batch_stats')
  }

  @jax.jit
  def observe(variables):
    _, taps = network.apply(variables, x, mutable=['batch_stats', 'moments'])
    names = trace(build).batch_norms
    moments = float_layers.ordered_moments(taps, trace(build))
    batch = map(batch_statistics, moments)
    return {
      name: {'mean': s.mean, 'var': jnp.square(s.std)}
      for name, s in zip(names, batch, strict=True)
    }

  return {**variables, 'batch_stats': observe(variables)}, prep


def teacher(arch: str, num_classes: int, seed: int = 0) -> teacher_lib.Teacher:
  """Returns a teacher as if loaded from such a file."""
  variables, prep = make(arch, num_classes, seed)
  build = registry.builder(arch, num_classes=num_classes)
  return teacher_lib.Teacher(
    build, trace(build), variables, prep, num_classes, 1.0, (), ()
  )


def write(
  path: pathlib.Path, arch: str, num_classes: int, seed: int = 0
) -> None:
  """Writes a weights file in the format of this project."""
  variables, prep = make(arch, num_classes, seed)
  graph = trace(registry.builder(arch, num_classes=num_classes))
  variables = jax.tree.map(np.asarray, variables)
  weights.save(path, graph, variables, dataclasses.asdict(prep), arch=arch)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--arch', required=True)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--num_classes', type=int, default=1000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  write(args.output, args.arch, args.num_classes, args.seed)


if __name__ == '__main__':
  main()
