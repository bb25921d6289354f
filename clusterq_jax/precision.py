"""Computation in float32, whatever JAX is set to.

With JAX_ENABLE_X64=1, common in scientific environments, numbers without a
dtype are float64. A student's codes and an exported file's integers depend on
the precision, so the package always computes in float32.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec('P')
T = TypeVar('T')


def in_float32(function: Callable[P, T]) -> Callable[P, T]:
  """Makes a function trace and run with float32 as the largest float."""

  @functools.wraps(function)
  def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
    with jax.enable_x64(False):
      return function(*args, **kwargs)

  return wrapped
