"""Rounding of weights that keeps a layer's outputs, rather than its weights.

What one weight loses when it is rounded, those that see correlated inputs can
make good. So weights are rounded one input at a time, and each error is spread
over the inputs still to come, such that the squared error of the outputs grows
least. Source: GPTQ, Frantar et al., arXiv 2210.17323 (eqs. 2, 3).

Shapes: G groups of input channels, N inputs of an output, O output channels, P
outputs of a channel that are looked at.
"""

import jax
import jax.numpy as jnp
from jax import lax

from clusterq_jax.quant import numerics

# Of the mean square of the inputs, added to each one's.
_DAMPING = 0.01


def compensate(
  kernel: jax.Array,
  patches: jax.Array,
  step: jax.Array,
  low: numerics.Code,
  high: numerics.Code,
) -> jax.Array:
  """Rounds weights, with little change of what they give.

  Args:
    kernel: [..., O], with N the product of the leading axes; the outputs of a
      group of input channels stand together.
    patches: inputs, [P, G, N].
    step: of the weights, [O].
    low: smallest code.
    high: largest code.

  Returns:
    The shape of kernel; its step times a whole number between low and high.
  """
  count, groups, inputs = patches.shape
  # The default precision of accelerators would leave them not quite positive.
  moments = jnp.einsum(
    'pgn,pgm->gnm', patches, patches, precision=lax.Precision.HIGHEST
  )
  moments /= count
  power = jnp.mean(jnp.diagonal(moments, axis1=1, axis2=2), -1)
  # More, the fewer outputs there are to tell the inputs apart.
  damping = (_DAMPING + inputs / count) * power + 1e-12
  moments += damping[:, None, None] * jnp.eye(inputs)
  columns = kernel.reshape(inputs, groups, -1).swapaxes(0, 1)
  rounded = jax.vmap(_compensate, (0, 0, 0, None, None))(
    columns, moments, step.reshape(groups, -1), low, high
  )
  return rounded.swapaxes(0, 1).reshape(kernel.shape)


def _compensate(kernel, moments, step, low, high):
  """Of one group: kernel [N, O], positive definite moments [N, N], step [O]."""
  # Those that matter most first, while the others can still make up for them.
  order = jnp.argsort(-jnp.diagonal(moments))
  inverse = jnp.linalg.inv(moments[order][:, order])
  factor = jnp.linalg.cholesky(inverse, upper=True)

  def round_one(i, weights):
    row = weights[i]
    error = row - numerics.fake_quant(row, step, low, high)
    return weights - factor[i][:, None] * (error / factor[i, i])

  rounded = lax.fori_loop(0, len(order), round_one, kernel[order])
  # What is left of a weight after its own error is its code, but for the last
  # bits.
  rounded = numerics.fake_quant(rounded, step, low, high)
  return rounded[jnp.argsort(order)]
