"""Tables of output codes, for the layers that look them up.

They hold what ONNX Runtime computes on x86. Adds and products are exact, and so
is a lone sigmoid or leaky_relu. ONNX Runtime computes other activations in
float32 between two grids. Their results may differ in the last bit, which
changes a code only next to the middle between two codes.
"""

import math

import numpy as np

from clusterq_jax.deploy.integer import Grid
from clusterq_jax.layers import functions
from clusterq_jax.models.node import Node
from clusterq_jax.models.preprocessing import Preprocessing

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _codes(real: np.ndarray, grid: Grid) -> np.ndarray:
  codes = np.rint(real.astype(np.float32) / grid.step) + np.float32(grid.zero)
  return np.clip(codes, grid.low, grid.high).astype(np.uint8)


def normalization(
  preprocessing: Preprocessing,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (gain, offset), float32 [C]: input = pixel * gain + offset."""
  mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
  gain = preprocessing.pixel_range / 255 / std
  return gain.astype(np.float32), (-mean / std).astype(np.float32)


def pixels(grid: Grid, preprocessing: Preprocessing) -> np.ndarray:
  """Returns the code of each pixel value 0 to 255, uint8 [C, 256]."""
  gain, offset = normalization(preprocessing)
  x = np.arange(256, dtype=np.float32) * gain[:, None] + offset[:, None]
  return _codes(x, grid)


def requantized(sources: tuple[Grid, ...], out: Grid) -> np.ndarray | None:
  """Returns the codes of each input's values on another grid.

  Returns:
    uint8 [inputs, 256]; None if all codes stay as they are.
  """
  if all(source.same_codes(out) for source in sources):
    return None
  rows = [
    np.arange(256, dtype=np.uint8)
    if source.same_codes(out)
    else _codes(source.values(), out)
    for source in sources
  ]
  return np.stack(rows)


def add(a: Grid, b: Grid, out: Grid) -> np.ndarray:
  """Returns the output code for each pair of operand codes, uint8 [256, 256].

  ONNX Runtime computes two fused multiply-adds, the second operand first. The
  products and sums are exact in float64. One rounding to float32 after each sum
  gives the result of a fused multiply-add.
  """
  ratio_a, ratio_b = a.step / out.step, b.step / out.step
  zeros = ratio_a * np.float32(a.zero) + ratio_b * np.float32(b.zero)
  codes = np.arange(256, dtype=np.float64)
  y = np.float32(codes * ratio_b + np.float32(out.zero - zeros))
  x = np.float32(codes[:, None] * ratio_a + np.float64(y))
  return np.clip(np.rint(x), out.low, out.high).astype(np.uint8)


def multiply(a: Grid, b: Grid, out: Grid) -> np.ndarray:
  """Returns the output code for each pair of operand codes, uint8 [256, 256].

  ONNX Runtime adds the zero point before it rounds.
  """
  codes = np.arange(256, dtype=np.float32)
  product = (codes[:, None] - np.float32(a.zero)) * (codes - np.float32(b.zero))
  scaled = product * (a.step * b.step / out.step) + np.float32(out.zero)
  return np.clip(np.rint(scaled), out.low, out.high).astype(np.uint8)


def activation(
  node: Node, source: Grid, out: Grid, slope: np.ndarray | None = None
) -> np.ndarray:
  """Returns the output code for each input code.

  Args:
    node: layer that is an activation.
    source: grid of the input.
    out: grid of the output.
    slope: slopes of prelu below zero, [C].

  Returns:
    uint8 [256], or [C, 256] with slopes.
  """
  x = source.values()
  if slope is not None:
    below = x * np.asarray(slope, np.float32)[:, None]
    return _codes(np.where(x < 0, below, x), out)
  return _codes(_activate(node, x), out)


def _activate(node: Node, x: np.ndarray) -> np.ndarray:
  """Computes `functions.activate`, for float32 x of any shape."""
  act, exact = node.act, x.astype(np.float64)
  if act in ('relu', 'relu6'):
    return np.clip(x, 0, functions.RELU6 if act == 'relu6' else None)
  if act == 'leaky_relu':
    return np.where(x < 0, x * np.float32(node.slope), x)
  if act == 'elu':
    return np.where(
      x < 0, np.float32(node.slope) * np.expm1(np.minimum(exact, 0)), x
    )
  if act == 'sigmoid':
    return 1 / (1 + np.exp(-np.maximum(exact, -700)))
  if act == 'tanh':
    return np.tanh(exact)
  if act == 'gelu':
    return exact * 0.5 * (1 + _erf(exact / np.sqrt(2)))
  if act == 'gelu_tanh':
    inner = np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)
    return exact * 0.5 * (1 + np.tanh(inner))
  gate = np.clip(x * np.float32(1 / 6) + np.float32(0.5), 0, 1)
  assert act in ('hard_sigmoid', 'hard_swish')
  return gate if act == 'hard_sigmoid' else x * gate
