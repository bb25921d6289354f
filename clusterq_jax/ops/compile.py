"""XLA compiler options for fast convolutions."""

import pathlib
import platform

import jax

_CPU_INFO = pathlib.Path('/proc/cpuinfo')


def compiler_options() -> dict[str, str]:
  """Returns compiler options for `jax.jit(compiler_options=)`.

  On x86, Eigen's convolutions are faster than YNN's, which XLA's CPU backend
  prefers (jax 0.10). Measured on two cores:

    CPU                          step            YNN              Eigen
    Zen 3, no AVX-512            generator       0.46 s           0.31 s
    Zen 3, no AVX-512            student         0.60 to 0.70 s   0.54 s
    Sapphire Rapids, AVX-512     joint, B = 128  0.84 s           0.79 s

  On Sapphire Rapids, 512-bit vectors reduce the joint step to 0.75 s. XLA's
  default there is 256 bits.

  Returns:
    The value of each XLA option; {} where XLA's defaults stay.
  """
  x86 = platform.machine() in ('x86_64', 'AMD64') and _CPU_INFO.exists()
  if jax.default_backend() != 'cpu' or not x86:
    return {}
  options = {'xla_cpu_experimental_ynn_fusion_type': ''}  # disables YNN
  if 'avx512f' in _CPU_INFO.read_text():
    options['xla_cpu_prefer_vector_width'] = '512'
  return options
