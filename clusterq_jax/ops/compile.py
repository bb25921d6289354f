"""XLA compiler options for fast convolutions."""

import functools
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax

_CPU_INFO = pathlib.Path('/proc/cpuinfo')
_YNN = 'xla_cpu_experimental_ynn_fusion_type'


@functools.cache
def _is_known(name: str, value: str) -> bool:
  """Tells whether XLA has an option; a release may drop experimental ones."""
  try:
    jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True


def compiler_options() -> dict[str, str]:
  """Returns compiler options for `jax.jit(compiler_options=)`.

  On x86, Eigen's convolutions are faster than YNN's, which XLA's CPU backend
  prefers. Measured on two cores with jax 0.10:

    CPU                          step            YNN              Eigen
    Zen 3, no AVX-512            generator       0.46 s           0.31 s
    Zen 3, no AVX-512            student         0.60 to 0.70 s   0.54 s
    Sapphire Rapids, AVX-512     joint, B = 128  0.84 s           0.79 s

  On Sapphire Rapids, 512-bit vectors reduce the joint step to 0.75 s. XLA's
  default there is 256 bits.

  Later releases improve YNN, but Eigen's weight gradients stay faster. Speed of
  YNN divided by that of Eigen, for 3x3 kernels with 16, 32 and 64 channels on
  two cores without AVX-512 (two runs, which differ by up to a third):

    jax       forward, input gradient            weight gradient
              16 channels    32 and 64 channels
    0.10.2    1.0 to 1.2     0.5 to 0.6          0.4 to 0.5
    0.11.2    1.0 to 1.3     0.8 to 1.2          0.7 to 0.9
    0.12.0    1.0 to 1.4     0.8 to 1.0          0.7 to 0.9

  LLVM's level 2 compiles a student step in 14 s instead of 17 s; the step takes
  as long as with level 3.

  Returns:
    The value of each XLA option; {} where XLA's defaults stay.
  """
  x86 = platform.machine() in ('x86_64', 'AMD64') and _CPU_INFO.exists()
  if jax.default_backend() != 'cpu' or not x86:
    return {}
  options = {_YNN: ''}  # disables YNN
  if not jax.config.read('jax_disable_most_optimizations'):
    options['xla_backend_optimization_level'] = '2'
  if 'avx512f' in _CPU_INFO.read_text():
    options['xla_cpu_prefer_vector_width'] = '512'
  return {name: v for name, v in options.items() if _is_known(name, v)}


def jit(function: Callable, **kwargs: Any) -> Any:
  """Returns `jax.jit(function, **kwargs)` with `compiler_options`.

  JAX refuses the result inside another `jit`.
  """
  return jax.jit(function, compiler_options=compiler_options(), **kwargs)
