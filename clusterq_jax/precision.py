"""Computation in float32, whatever JAX is set to.

A student's codes and an exported file's integers depend on the precision. Two
settings of JAX would change it:

- With JAX_ENABLE_X64=1, common in scientific environments, numbers without a
  dtype are float64. The package always computes in float32.
- By default, accelerators round the factors of products: NVIDIA GPUs to TF32
  (10 bits after the point), TPUs to bfloat16 (7 bits). Calibration and the
  integer network ask for all 23 bits. Steps follow JAX.
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


def with_full_products(function: Callable[P, T]) -> Callable[P, T]:
  """Makes a function trace convolutions and matrix products in full float32.

  JAX keeps its precision by thread, so it is set where the function is traced.
  Arrays in bfloat16 stay in bfloat16.
  """

  @functools.wraps(function)
  def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
    with jax.default_matmul_precision('highest'):
      return function(*args, **kwargs)

  return wrapped
