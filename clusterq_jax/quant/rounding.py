"""Rounds weights to preserve a layer's outputs (GPTQ).

The rounding error of one weight can be compensated by weights whose inputs are
correlated with it. Weights are rounded one input at a time. The remaining
weights then change to minimise the squared error of the outputs.

Shapes: G groups of input channels, N inputs of each output, O output channels,
P output pixels in the sample.

References:
  Frantar et al., GPTQ, arXiv 2210.17323, eqs. 2 and 3.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from clusterq_jax.quant import numerics

# Fraction of the inputs' mean square that is added to the diagonal of moments.
_DAMPING = 0.01
# With more inputs, their moments would take gigabytes and minutes. Only hidden
# dense layers on feature maps have so many; their weights round one by one.
_MOST_INPUTS = 8192


class Inputs(NamedTuple):
  """What `compensate` knows of a kernel's inputs.

  Attributes:
    moments: second moments, [G, N, N].
    pixels: number P of output pixels.
  """

  moments: jax.Array
  pixels: int


def measure(
  patches: Callable[[jax.Array], jax.Array], batches: jax.Array
) -> Inputs:
  """Measures the inputs of a kernel, one batch after the other.

  The patches of all images together may take gigabytes.

  Args:
    patches: maps a batch to the kernel's inputs at its p output pixels,
      [p, G, N].
    batches: batches of the same size, stacked along the first axis.

  Returns:
    The moments and the number of pixels over all batches.
  """
  shape = jax.eval_shape(patches, batches[0]).shape
  pixels = len(batches) * shape[0]

  def add(total, batch):
    x = patches(batch)
    # Products in the default precision of accelerators might not be positive
    # definite.
    return total + jnp.einsum(
      'pgn,pgm->gnm', x, x, precision=lax.Precision.HIGHEST
    ), None

  zeros = jnp.zeros((shape[1], shape[2], shape[2]), batches.dtype)
  total, _ = lax.scan(add, zeros, batches)
  return Inputs(total / pixels, pixels)


def compensate(
  kernel: jax.Array,
  inputs: Callable[[], Inputs],
  step: jax.Array,
  low: numerics.Code,
  high: numerics.Code,
) -> jax.Array:
  """Rounds weights to preserve the products of inputs and weights.

  Args:
    kernel: weights, [..., O]; N is the product of the leading axes. The outputs
      of one group of input channels are adjacent.
    inputs: measures the kernel's inputs; not called above `_MOST_INPUTS`.
    step: step of the weights of each output channel, [O].
    low: smallest code.
    high: largest code.

  Returns:
    The rounded weights, with the shape of kernel: integers from low to high,
    times the step.
  """
  if math.prod(kernel.shape[:-1]) > _MOST_INPUTS:
    return numerics.fake_quant(kernel, step, low, high)
  moments, pixels = inputs()
  groups, n = moments.shape[:2]
  power = jnp.mean(jnp.diagonal(moments, axis1=1, axis2=2), -1)
  # Few output pixels determine the correlations badly, so they damp more.
  damping = (_DAMPING + n / pixels) * power + 1e-12
  moments += damping[:, None, None] * jnp.eye(n)
  columns = kernel.reshape(n, groups, -1).swapaxes(0, 1)
  rounded = jax.vmap(_compensate, (0, 0, 0, None, None))(
    columns, moments, step.reshape(groups, -1), low, high
  )
  return rounded.swapaxes(0, 1).reshape(kernel.shape)


def _compensate(kernel, moments, step, low, high):
  """Rounds the kernel of one group.

  Args:
    kernel: [N, O].
    moments: positive definite second moments of the inputs, [N, N].
    step: [O].
    low: smallest code.
    high: largest code.

  Returns:
    The rounded kernel, [N, O].
  """
  # The inputs with the most power come first, while the others can compensate.
  order = jnp.argsort(-jnp.diagonal(moments))
  moments = moments[order][:, order]
  # The upper Cholesky factor of the inverse, without the inverse: if flipped
  # moments are L L', then moments are R R' with R = flipped L, upper.
  flipped = jnp.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
  factor = solve_triangular(flipped, jnp.eye(len(order)))

  def round_one(i, weights):
    row = weights[i]
    error = row - numerics.fake_quant(row, step, low, high)
    return weights - factor[i][:, None] * (error / factor[i, i])

  rounded = lax.fori_loop(0, len(order), round_one, kernel[order])
  # Each weight is now on its grid up to float errors, which this removes.
  rounded = numerics.fake_quant(rounded, step, low, high)
  return rounded[jnp.argsort(order)]
