"""Compiles programs ahead of time, in a thread, and measures the seconds."""

import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clusterq_jax import sharding
from clusterq_jax.ops import compile as compile_options
from clusterq_jax.runtime import metrics

Program = jax.stages.Compiled


class Pending(NamedTuple):
  """A program that is being compiled, or waits for its turn.

  Attributes:
    name: name of the function, for messages.
    future: the program.
  """

  name: str
  future: futures.Future[Program]


class Compiler:
  """Ahead-of-time compiler with one thread, which adds up its seconds.

  Ahead-of-time programs reject new shapes instead of recompiling. Arguments and
  results are replicated on every device.

      pending = compiler.start(function, *args)  # compiles in the thread
      program = compiler.wait(pending)
      program = compiler(function, *args)        # does both

  Programs are compiled in the order of `start`. Leaving the context manager
  drops those that have not begun.

  Attributes:
    seconds: time that callers waited for programs so far, in seconds.
    total_seconds: time that compilation took so far, in seconds.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self.seconds = self.total_seconds = 0.0
    self._everywhere = sharding.replicated(mesh)
    self._thread = _thread()

  def __enter__(self) -> 'Compiler':
    return self

  def __exit__(self, *_: object) -> None:
    self._thread.shutdown(wait=False, cancel_futures=True)
    self._thread = _thread()

  def start(self, function: Callable, *args, donate: bool = False) -> Pending:
    """Begins to compile a function for given arguments.

    Args:
      function: function of `args`; its name appears in progress messages.
      *args: arrays or `jax.ShapeDtypeStruct` trees.
      donate: whether the program may reuse the memory of the first argument.

    Returns:
      The argument of `wait`.
    """
    args = jax.tree.map(_abstract, args)
    # The setting of the caller holds for its own thread alone.
    wide = jnp.result_type(float) == jnp.float64
    name = getattr(function, '__name__', 'a program').replace('_', ' ')
    future = self._thread.submit(self._timed, function, args, donate, wide)
    return Pending(name, future)

  def wait(self, pending: Pending) -> Program:
    """Returns the program of `start` once it is compiled."""
    began = time.monotonic()
    with metrics.Waiting(f'compiling {pending.name}'):
      program = pending.future.result()
    self.seconds += time.monotonic() - began
    return program

  def __call__(
    self, function: Callable, *args, donate: bool = False
  ) -> Program:
    """Compiles a function for given arguments; see `start`."""
    return self.wait(self.start(function, *args, donate=donate))

  def _timed(self, function, args, donate, wide) -> Program:
    began = time.monotonic()
    with jax.enable_x64(wide):
      program = self.compile(function, args, donate)
    metrics.release_memory()
    self.total_seconds += time.monotonic() - began
    return program

  def compile(self, function: Callable, args: Any, donate: bool) -> Program:
    """Compiles a function in the thread that calls."""
    jitted = compile_options.jit(
      function,
      donate_argnums=(0,) if donate else (),
      out_shardings=self._everywhere,
    )
    return jitted.lower(*args).compile()


def _thread() -> futures.Executor:
  # XLA's compiler uses all cores, so a second thread would not help.
  return futures.ThreadPoolExecutor(1, 'compiler')


def _abstract(leaf: Any) -> Any:
  """Returns the shape of an array, which may be donated before its turn."""
  if not isinstance(leaf, jax.Array):
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
