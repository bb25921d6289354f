"""Compiles programs ahead of time and measures the seconds."""

import time
from collections.abc import Callable

import jax

from clusterq_jax import sharding
from clusterq_jax.ops import compile as compile_options
from clusterq_jax.runtime import metrics


class Compiler:
  """Ahead-of-time compiler that adds up the seconds it takes.

  Ahead-of-time programs reject new shapes instead of recompiling. Arguments and
  results are replicated on every device.

  Attributes:
    seconds: compilation time so far, in seconds.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self.seconds = 0.0
    self._everywhere = sharding.replicated(mesh)

  def __call__(
    self, function: Callable, *args, donate: bool = False
  ) -> jax.stages.Compiled:
    """Compiles a function for given arguments.

    Args:
      function: function of `args`; its name appears in progress messages.
      *args: arrays or `jax.ShapeDtypeStruct` trees.
      donate: whether the program may reuse the memory of the first argument.
    """
    start = time.monotonic()
    jitted = jax.jit(
      function,
      donate_argnums=(0,) if donate else (),
      out_shardings=self._everywhere,
      compiler_options=compile_options.compiler_options(),
    )
    name = getattr(function, '__name__', 'a program').replace('_', ' ')
    with metrics.Waiting(f'compiling {name}'):
      compiled = jitted.lower(*args).compile()
    self.seconds += time.monotonic() - start
    return compiled
