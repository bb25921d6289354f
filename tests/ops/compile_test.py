"""XLA options for fast convolutions on CPU."""

import jax
import jax.numpy as jnp
import pytest

from clusterq_jax.ops import compile, convolution


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='options for CPUs')
def test_compiler_options(monkeypatch, tmp_path):
  info = tmp_path / 'cpuinfo'
  monkeypatch.setattr(compile, '_CPU_INFO', info)
  monkeypatch.setattr('platform.machine', lambda: 'x86_64')
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
  info.write_text('flags: avx2')
  options = compile.compiler_options()
  info.write_text('flags: avx2 avx512f')
  wide = compile.compiler_options()
  assert options.items() < wide.items()
  # Every supported jax knows all options.
  assert set(wide) - set(options) == {'xla_cpu_prefer_vector_width'}
  assert 'xla_cpu_experimental_ynn_fusion_type' in options
  y = jax.jit(convolution.conv2d, compiler_options=wide)(x, kernel)
  assert y[0, 4, 4, 0] == 36

  monkeypatch.setattr('platform.machine', lambda: 'aarch64')
  assert not compile.compiler_options()


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='options for CPUs')
def test_an_unknown_option_is_left_out(monkeypatch, tmp_path):
  info = tmp_path / 'cpuinfo'
  info.write_text('flags: avx2')
  monkeypatch.setattr(compile, '_CPU_INFO', info)
  monkeypatch.setattr('platform.machine', lambda: 'x86_64')
  monkeypatch.setattr(compile, '_YNN', 'xla_no_such_option')
  assert not compile.compiler_options()
