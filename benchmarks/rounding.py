"""Closed-form rounding of weights without data, after SQuant.

References:
  Guo et al., SQuant, arXiv 2202.07471. Its restriction of a channel's flips to
  one per window is left out.
"""

import numpy as np

from clusterq_jax.quant import numerics


def _flip(errors: np.ndarray, codes: np.ndarray, high: int) -> None:
  """Moves codes to their other neighbour until the errors add up to about 0.

  Args:
    errors: exact codes minus `codes`, [N]; changed in place.
    codes: integers, [N]; changed in place.
    high: largest magnitude of a code.
  """
  count = int(np.round(errors.sum()))
  sign = np.sign(count)
  free = (errors * sign > 0) & (np.abs(codes + sign) <= high)
  chosen = np.argsort(np.where(free, -errors * sign, 1.0))[: abs(count)]
  chosen = chosen[free[chosen]]
  codes[chosen] += sign
  errors[chosen] -= sign


def squant(kernel: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
  """Rounds a kernel so that errors cancel within a window and a channel.

  Args:
    kernel: [H, W, C, O] or [C, O].
    step: of each output channel, [O].
    bits: of the weights.

  Returns:
    The rounded kernel.
  """
  _, high = numerics.weight_range(bits)
  exact = np.clip(kernel / step, -high, high)
  # [O, C, window], so that windows and channels are views.
  exact = np.moveaxis(exact.reshape(-1, *kernel.shape[-2:]), 0, -1).swapaxes(
    0, 1
  )
  exact = np.ascontiguousarray(exact)
  codes = np.round(exact)
  errors = exact - codes
  for e, q in zip(errors, codes, strict=True):
    if exact.shape[-1] > 1:
      for window_errors, window in zip(e, q, strict=True):
        _flip(window_errors, window, high)
    _flip(e.reshape(-1), q.reshape(-1), high)
  codes = np.moveaxis(codes.swapaxes(0, 1), -1, 0).reshape(kernel.shape)
  return (codes * step).astype(np.float32)
