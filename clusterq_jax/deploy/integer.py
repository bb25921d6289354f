"""The integer network: what a runtime executes, in JAX, bit for bit.

    fold     student -> integer weights, biases and multipliers (NumPy, once)
    logits   uint8 images -> logits, in integers (JAX, under jit)

Both walk the wiring that was read off the architecture (`protocol.Graph`). The
arithmetic is that of ONNX Runtime's quantized operators on x86: a convolution
or classifier accumulates (code - zero point) * weight code in 32-bit integers,
with the bias in it, and rescales once, by one float32 multiplier per channel,
rounding to even; so does an average; an add is one fused multiply-add per
operand, here a table over pairs of codes. BatchNorm is folded into the scale of
the weights and into the bias, never into the integer weights, but for the sign
of its gain.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clusterq_jax.layers import float_layers
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.models.protocol import Graph, Node
from clusterq_jax.ops import convolution
from clusterq_jax.quant import numerics
from clusterq_jax.quant.plan import Plan

# Sums of products below this are exact in float32, in any order.
_EXACT = 2**24
# Of the 32 bits of a bias; a dead BatchNorm gain would ask for more.
_BIAS_LIMIT = 2**30
# What one 16-bit sum of two products holds in the kernels of CPUs without VNNI.
_PAIR_LIMIT = 2**15 - 1


class Grid(NamedTuple):
  """How a tensor of unsigned 8-bit codes stands for real numbers.

  Attributes:
    step: real = step * (code - zero).
    zero: the code of zero: 0, or 128 for signed tensors.
    low: smallest code.
    high: largest code.
  """

  step: np.float32
  zero: int
  low: int
  high: int


@dataclasses.dataclass(frozen=True)
class Folded:
  """An integer network.

  Attributes:
    graph: the wiring.
    grids: of every tensor but the logits, by the name of its layer.
    tensors: arrays by layer name. Input: `table` uint8 [C, 256], pixel to code.
      Convolution and classifier: `codes` int8 [..., O], `bias` int32 [O],
      `multiplier` float32 [O]. Add: `table` uint8 [256, 256]. Average pool:
      `multiplier` float32 [].
    weight_steps: float32 [O] by layer name: what a weight code is worth; of an
      average pool, whose codes would all be one, [].
    factors: by layer name: the codes are this many times those of few bits.
    wide: layers whose sums could leave what float32 holds exactly.
    preprocessing: the input's.
  """

  graph: Graph
  grids: dict[str, Grid]
  tensors: dict[str, dict[str, np.ndarray]]
  weight_steps: dict[str, np.ndarray]
  factors: dict[str, int]
  wide: frozenset[str]
  preprocessing: Preprocessing

  def logits(self, images: jax.Array) -> jax.Array:
    """uint8 images [B, H, W, C], RGB, to float32 logits [B, K]; under `jit`."""
    values: dict[str, jax.Array] = {}
    for node in self.graph.nodes:
      own = jax.tree.map(jnp.asarray, self.tensors.get(node.name))
      inputs = [values[name] for name in node.inputs if name in values]
      layer = getattr(self, f'_{node.op}')
      values[node.name] = layer(node, own, *inputs or [images])
    return values[self.graph.nodes[-1].name]

  def _input(self, node, own, images):
    del node
    if self.preprocessing.channel_order == 'bgr':
      images = images[..., ::-1]
    return jnp.stack(
      [row[images[..., c]] for c, row in enumerate(own['table'])], -1
    )

  def _sums(self, node: Node, own, x: jax.Array, product) -> jax.Array:
    """Exact int32 sums of products of centred codes, bias included.

    In float32, which holds them exactly and is fast everywhere; where it might
    not, the codes go in as two halves of four bits.
    """
    x = x.astype(jnp.int32) - self.grids[node.inputs[0]].zero

    def whole(x):
      kernel = own['codes'].astype(jnp.float32)
      return product(x.astype(jnp.float32), kernel).astype(jnp.int32)

    if node.name in self.wide:
      return 16 * whole(x >> 4) + whole(x & 15) + own['bias']
    return whole(x) + own['bias']

  def _to_grid(self, node: Node, scaled: jax.Array) -> jax.Array:
    grid = self.grids[node.name]
    codes = jnp.round(scaled) + grid.zero
    return jnp.clip(codes, grid.low, grid.high).astype(jnp.uint8)

  def _conv_bn(self, node, own, x):
    convolve = functools.partial(
      convolution.convolve,
      strides=node.strides,
      pads=convolution.explicit(x, node.kernel, node.strides, node.padding),
      groups=node.groups,
      precision=lax.Precision.HIGHEST,
    )
    sums = self._sums(node, own, x, convolve)
    return self._to_grid(node, sums.astype(jnp.float32) * own['multiplier'])

  def _dense(self, node, own, x):
    multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    sums = self._sums(node, own, float_layers.flatten(x), multiply)
    return sums.astype(jnp.float32) * own['multiplier']

  def _add(self, node, own, x, y):
    pairs = x.astype(jnp.int32) * 256 + y
    return own['table'].reshape(-1)[pairs]

  def _pad_shortcut(self, node, own, x):
    del own
    missing = node.features - x.shape[-1]
    before = missing // 2
    x = x[:, :: node.strides, :: node.strides]
    zero = np.uint8(self.grids[node.name].zero)
    channels = ((0, 0), (0, 0), (0, 0), (before, missing - before))
    return jnp.pad(x, channels, constant_values=zero)

  def _max_pool(self, node, own, x):
    del own
    # uint8 has no minus infinity; padding takes the smallest code.
    window = (1, node.kernel, node.kernel, 1)
    strides = (1, node.strides, node.strides, 1)
    pads = convolution.explicit(x, node.kernel, node.strides, node.padding)
    zero = np.uint8(0)
    return lax.reduce_window(
      x, zero, lax.max, window, strides, ((0, 0), *pads, (0, 0))
    )

  def _avg_pool(self, node, own, x):
    window = (1, node.kernel, node.kernel, 1)
    strides = (1, node.strides, node.strides, 1)
    centred = x.astype(jnp.int32) - self.grids[node.inputs[0]].zero
    sums = lax.reduce_window(
      centred, np.int32(0), lax.add, window, strides, 'VALID'
    )
    return self._to_grid(node, sums.astype(jnp.float32) * own['multiplier'])

  def _global_avg_pool(self, node, own, x):
    del own
    source, grid = self.grids[node.inputs[0]], self.grids[node.name]
    pixels = np.float32(x.shape[1] * x.shape[2])
    sums = jnp.sum(x.astype(jnp.int32) - source.zero, (1, 2))
    multiplier = source.step / (grid.step * pixels)
    return self._to_grid(node, sums.astype(jnp.float32) * multiplier)


def fold(
  graph: Graph, plan: Plan, student: Any, preprocessing: Preprocessing
) -> Folded:
  """The integer network of a student with a quantizer on every output.

  Args:
    graph: the wiring.
    plan: the student's quantizers, placement 'integer'.
    student: {'params', 'batch_stats', 'quant'}.
    preprocessing: the student's.
  """
  grids: dict[str, Grid] = {}
  tensors: dict[str, dict[str, np.ndarray]] = {}
  steps, factors, wide = {}, {}, set()
  for node in graph.nodes:
    if node.moves:
      grids[node.name] = grids[node.inputs[0]]
    elif node.op != 'dense':
      grids[node.name] = _grid(node, plan, student)
    if node.op == 'input':
      table = _input_table(grids[node.name], preprocessing)
      tensors[node.name] = {'table': table}
    elif node.op == 'add':
      a, b = (grids[name] for name in node.inputs)
      table = _add_table(a, b, grids[node.name])
      tensors[node.name] = {'table': table}
    elif node.op == 'avg_pool':
      source, grid = grids[node.inputs[0]], grids[node.name]
      step = np.asarray(1 / node.kernel**2, np.float32)
      multiplier = np.asarray(source.step * step / grid.step)
      tensors[node.name] = {'multiplier': multiplier}
      steps[node.name] = step
    elif node.op in ('conv_bn', 'dense'):
      source = grids[node.inputs[0]]
      bits = plan.weight_bits(node.name)
      codes, bias, step, factor = _fold_weights(node, student, bits, source)
      multiplier = source.step * step
      if node.op == 'conv_bn':
        multiplier = multiplier / grids[node.name].step
      tensors[node.name] = {
        'codes': codes,
        'bias': bias,
        'multiplier': multiplier,
      }
      steps[node.name], factors[node.name] = step, factor
      largest = max(source.high - source.zero, source.zero - source.low)
      sums = np.abs(np.int64(codes)).sum(tuple(range(codes.ndim - 1)))
      if largest * sums.max() >= _EXACT:
        wide.add(node.name)
  return Folded(
    graph, grids, tensors, steps, factors, frozenset(wide), preprocessing
  )


def round_biases(folded: Folded, student: Any) -> dict[str, Any]:
  """The student's params with the biases that the integer network rounds to.

  With them, and kernels on their grid (`fake_quant.settle`), fake-quantized and
  integer network differ in float rounding alone. The integer network itself
  stays the same.

  Args:
    folded: from `fold`.
    student: what was folded, {'params', 'batch_stats', 'quant'}.
  """
  params = dict(student['params'])
  for node in folded.graph.nodes:
    if node.op in ('conv_bn', 'dense'):
      own = params[node.name]
      unit = np.float64(folded.grids[node.inputs[0]].step)
      rounded = folded.tensors[node.name]['bias'] * (
        unit * folded.weight_steps[node.name]
      )
      _, _, bias = folded_batch_norm(student, node)
      # With BatchNorm, its bias is one part of the convolution's.
      moved = np.asarray(own['bias'], np.float64) + (rounded - bias)
      params[node.name] = {**own, 'bias': moved.astype(np.float32)}
  return params


def _grid(node: Node, plan: Plan, student: Any) -> Grid:
  output = plan.output(node.name)
  assert output is not None, f'{node.name} has no quantizer'
  own = student['quant'].get(node.name, {})
  low, high = map(int, output.codes(own.get('zero_point')))
  step = output.step
  if step is None:
    step = np.exp(np.float32(own['output']))
  if node.act == 'relu6':
    high = min(high, int(np.rint(np.float32(float_layers.RELU6) / step)))
  zero = 128 if output.signed else 0
  return Grid(np.float32(step), zero, zero + low, zero + high)


def _input_table(grid: Grid, preprocessing: Preprocessing) -> np.ndarray:
  """Codes of the 256 values of a pixel, uint8 [C, 256]."""
  gain, offset = normalization(preprocessing)
  x = np.arange(256, dtype=np.float32) * gain[:, None] + offset[:, None]
  codes = np.rint(x / grid.step) + grid.zero
  return np.clip(codes, grid.low, grid.high).astype(np.uint8)


def normalization(preprocessing: Preprocessing):
  """(gain, offset), float32 [C]: network input = pixel * gain + offset."""
  mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
  gain = preprocessing.pixel_range / 255 / std
  return gain.astype(np.float32), (-mean / std).astype(np.float32)


def _add_table(a: Grid, b: Grid, out: Grid) -> np.ndarray:
  """Code of the sum by the codes of both operands, uint8 [256, 256].

  Two fused multiply-adds, the second operand first. Products and sums are exact
  in float64; one rounding to float32 after each makes them fused.
  """
  ratio_a, ratio_b = a.step / out.step, b.step / out.step
  zeros = ratio_a * np.float32(a.zero) + ratio_b * np.float32(b.zero)
  codes = np.arange(256, dtype=np.float64)
  y = np.float32(codes * ratio_b + np.float32(out.zero - zeros))
  x = np.float32(codes[:, None] * ratio_a + np.float64(y))
  return np.clip(np.rint(x), out.low, out.high).astype(np.uint8)


def folded_batch_norm(variables: Any, node: Node):
  """What a layer with weights computes: kernel * x * gain + bias.

  Args:
    variables: {'params', 'batch_stats'}.
    node: the layer.

  Returns:
    kernel float32 [..., O], gain float64 [O], bias float64 [O]; the gain of a
    layer without BatchNorm is one.
  """
  params = variables['params'][node.name]
  kernel = np.asarray(params['kernel'])
  bias = np.asarray(params['bias'], np.float64)
  if 'scale' not in params:
    return kernel, np.ones(len(bias)), bias
  mean, var, scale = (
    np.asarray(array, np.float64)
    for array in (
      variables['batch_stats'][node.name]['mean'],
      variables['batch_stats'][node.name]['var'],
      params['scale'],
    )
  )
  gain = scale / np.sqrt(var + node.epsilon)
  return kernel, gain, bias - mean * gain


def _fold_weights(node: Node, student: Any, bits: int, source: Grid):
  """Weight codes int8, bias int32 [O], step float32 [O], factor."""
  kernel, gain, bias = folded_batch_norm(student, node)
  low, high = numerics.weight_range(bits)
  log_step = student['quant'].get(node.name, {}).get('weights')
  if log_step is None:
    axes = tuple(range(kernel.ndim - 1))
    step = np.asarray(numerics.max_step(kernel, high, axes))
  else:
    step = np.exp(np.float32(log_step))
  codes = np.clip(np.rint(kernel / step), low, high)
  # A bias is a multiple of step * (step of the input), which at few bits is
  # coarse: larger codes of a smaller step make it finer.
  factor = min(127 // high, _PAIR_LIMIT // (2 * source.high * high))
  factor = max(factor, 1)
  worth = step * np.abs(gain)
  # A gain near zero: a coarser step, so that the bias fits.
  least = np.abs(bias) * factor / (source.step * _BIAS_LIMIT)
  floor = np.maximum(least, 1e-12)
  codes = np.where(worth < floor, np.rint(codes * worth / floor), codes)
  final = np.float32(np.maximum(worth, floor) / factor)
  codes = (codes * factor * np.where(gain < 0, -1, 1)).astype(np.int8)
  bias = np.rint(bias / (np.float64(source.step) * final)).astype(np.int32)
  return codes, bias, final, factor
