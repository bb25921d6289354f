"""Options of the compiler."""

import jax
import jax.numpy as jnp
import pytest

from clusterq_jax.ops import compile as compile_options
from clusterq_jax.ops import convolution


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='for CPUs')
def test_compiler_options(monkeypatch, tmp_path):
  info = tmp_path / 'cpuinfo'
  monkeypatch.setattr(compile_options, '_CPU_INFO', info)
  monkeypatch.setattr('platform.machine', lambda: 'x86_64')
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
  info.write_text('flags: avx2')
  options = compile_options.compiler_options()
  info.write_text('flags: avx2 avx512f')
  wide = compile_options.compiler_options()
  assert options.items() < wide.items()
  # An option that XLA does not know is an error.
  y = jax.jit(convolution.conv2d, compiler_options=wide)(x, kernel)
  assert y[0, 4, 4, 0] == 36

  monkeypatch.setattr('platform.machine', lambda: 'aarch64')
  assert not compile_options.compiler_options()
