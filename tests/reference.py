"""Layers in NumPy, which tests compare the package's layers with."""

import jax
import numpy as np

from clusterq_jax.runtime.compiler import Compiler


def numpy_conv(x, kernel, strides, padding, groups=1):
  """Sums over windows, in float64."""
  x, kernel = np.float64(x), np.float64(kernel)
  side, inputs, outputs = kernel.shape[0], kernel.shape[2], kernel.shape[3]
  x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  height = (x.shape[1] - side) // strides + 1
  width = (x.shape[2] - side) // strides + 1
  out = np.zeros((len(x), height, width, outputs))
  for o in range(outputs):
    group = o // (outputs // groups)
    own = slice(group * inputs, (group + 1) * inputs)
    for i, j in np.ndindex(height, width):
      window = x[:, i * strides :, j * strides :, own][:, :side, :side]
      out[:, i, j, o] = np.sum(window * kernel[..., o], (1, 2, 3))
  return out


def conv_variables(side, inputs, outputs):
  random = np.random.RandomState(1)
  shapes = {'scale': outputs, 'bias': outputs}
  params = {k: random.randn(n).astype(np.float32) for k, n in shapes.items()}
  kernel = random.randn(side, side, inputs, outputs).astype(np.float32)
  stats = {
    'mean': random.randn(outputs).astype(np.float32),
    'var': (0.1 + random.rand(outputs)).astype(np.float32),
  }
  return {'params': {'kernel': kernel, **params}, 'batch_stats': stats}


def numpy_batch_norm(h, variables):
  params, stats = variables['params'], variables['batch_stats']
  x = (h - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  return x * params['scale'] + params['bias']


class FastCompiler(Compiler):
  """Compiles without optimizations, where compiling is what takes time."""

  def compile(self, function, args, donate):
    jitted = jax.jit(function, donate_argnums=(0,) if donate else ())
    return jitted.lower(*args).compile(
      {
        'xla_backend_optimization_level': 0,
        'xla_llvm_disable_expensive_passes': True,
      }
    )
