"""The fake-quantized layers, which make the student.

They have the same parameters and BatchNorm statistics as the float layers, and
the collection `quant`; see `quant/quantizers.py`. BatchNorm statistics are the
teacher's and do not change. Gains and biases are trained. `quant/numerics.py`
has the formulas, and `quant/plan.py` decides places and bits.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clusterq_jax.layers import float_layers, functions
from clusterq_jax.models import protocol
from clusterq_jax.ops import channels, convolution
from clusterq_jax.ops.moments import (
  Statistics,
  batch_statistics,
  sample_moments,
)
from clusterq_jax.quant import numerics, quantizers, rounding
from clusterq_jax.quant.plan import Output, Plan

# Largest count of numbers in the patches that round a convolution: of all its
# images, which bounds the time, and of those in memory at once. All 64 images
# that calibrate EfficientNet-Lite0 fit.
_MOST_PATCHES, _PATCHES_AT_ONCE = 5 * 2**26, 2**24
# Largest factor by which calibration raises or lowers a gain. If few images
# activate a channel, its ratio of standard deviations is unreliable.
_LARGEST = 2.0


class _Quantized(nn.Module, kw_only=True):
  """Base of the quantized layers, with quantizers for weights and outputs.

  Attributes:
    plan: quantizers of the student.
    calibrate: whether the layer sets its steps from the values that it sees. If
      steps are learned and `params` is mutable, it also rounds the weights to
      preserve its outputs. With the collection `targets`, it also corrects the
      biases; see `QuantConvBN` and `QuantConv`.
    observe: whether the layer sows the log of its output's largest-magnitude
      step into `ranges`.
  """

  plan: Plan
  calibrate: bool = False
  observe: bool = False

  @property
  def _own(self) -> Mapping[str, Any]:
    """Returns this layer's part of `quant`."""
    return self.variables.get('quant', {})

  def _store(self, key: str, best: Callable[[], jax.Array]) -> None:
    """Declares a variable of `quant`; calibration sets it to `best()`."""
    variable = self.variable('quant', key, best)
    if self.calibrate:
      variable.value = best()

  def quantize_weights(
    self, kernel: jax.Array, inputs: Callable[[], rounding.Inputs]
  ) -> jax.Array:
    """Quantizes a kernel [..., O] with one step per output channel.

    Args:
      kernel: the weights.
      inputs: measures the inputs of the kernel.

    Returns:
      The quantized weights, [..., O].
    """
    assert self.name is not None
    if self.plan.learned:
      low, high = numerics.weight_range(self.plan.weight_bits(self.name))
      axes = tuple(range(kernel.ndim - 1))
      self._store(
        'weights', lambda: jnp.log(numerics.mse_step(kernel, low, high, axes))
      )
    grid = quantizers.weight_grid(self.plan, self.name, kernel, self._own)
    if not (
      self.plan.learned
      and self.calibrate
      and self.is_mutable_collection('params')
    ):
      return grid.quantize(kernel)
    rounded = rounding.compensate(kernel, inputs, *grid)
    self.put_variable('params', 'kernel', rounded)
    return rounded

  def quantize_output(self, x: jax.Array) -> jax.Array:
    """Quantizes x of any shape if the plan has a quantizer for the output."""
    assert self.name is not None
    output = self.plan.output(self.name)
    if output is not None and output.step is None:
      self._calibrate_output(x, output)
    grid = quantizers.output_grid(self.plan, self.name, self._own)
    return x if grid is None else grid.quantize(x)

  def _calibrate_output(self, x: jax.Array, output: Output) -> None:
    """Declares, calibrates and observes the output's quantizer."""
    if output.zero_point:
      # The search is traced twice and computed once: XLA merges the copies.
      self._store(
        'output', lambda: jnp.log(numerics.mse_zero_point(x, output.bits)[0])
      )
      self._store(
        'zero_point', lambda: numerics.mse_zero_point(x, output.bits)[1]
      )
      return
    low, high = output.codes()
    axes = tuple(range(x.ndim))

    def largest():
      return jnp.log(numerics.max_step(jax.lax.stop_gradient(x), high, axes))

    def best():
      if self.plan.learned:
        return jnp.log(numerics.mse_step(x, low, high, axes))
      return largest()

    if self.observe:
      self.sow(
        'ranges',
        'output',
        largest(),
        reduce_fn=lambda _, new: new,
        init_fn=lambda: None,
      )
    self._store('output', best)


def _inputs(layer: float_layers.ConvBase, x: jax.Array) -> rounding.Inputs:
  """Measures the inputs of a convolution's kernel.

  Args:
    layer: the convolution.
    x: its input, [B, H, W, I].
  """
  one = math.prod(jax.eval_shape(layer.patches, x[:1]).shape)
  x = x[: max(1, _MOST_PATCHES // one)]
  most = min(len(x), max(1, _PATCHES_AT_ONCE // one))
  size = max(n for n in range(1, most + 1) if len(x) % n == 0)
  return rounding.measure(layer.patches, x.reshape(-1, size, *x.shape[1:]))


class QuantConvBN(_Quantized, float_layers.BatchNormBase):
  """Quantized convolution, frozen BatchNorm, activation and output quantizer.

  Calibration reads the collection `targets`. Its entry `input` holds the
  statistics that the BatchNorm's input should have, [O] each.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, I] to [B, H', W', O]."""
    kernel, scale, bias, mean, var = self.make_variables(x)
    quantized = self.quantize_weights(kernel, lambda: _inputs(self, x))
    if self.calibrate and self.has_variable('targets', 'input'):
      h = self.convolve(x, quantized)
      scale, bias = self._corrected(h, scale, bias, mean.value, var.value)
    # With the BatchNorm's gain in the kernel, its gradient is a sum over the
    # kernel and not over the outputs. Only calibration convolves twice.
    gain = scale * jax.lax.rsqrt(var.value + self.epsilon)
    h = self.convolve(x, quantized * gain)
    h = channels.shift(h, bias - mean.value * gain)
    return self.quantize_output(functions.activate(h, self.act))

  def _corrected(self, h, scale, bias, mean, var):
    """Computes the gain and bias that restore the statistics in `targets`.

    Rounded weights and inputs shift and scale every channel. At few bits, the
    predictions would be random without this correction.

    Args:
      h: input of the BatchNorm, [B, H', W', O].
      scale: gain of the BatchNorm, [O].
      bias: bias of the BatchNorm, [O].
      mean: stored mean, [O].
      var: stored variance, [O].

    Returns:
      The corrected gain and bias, [O] each; they are also written to `params`.

    References:
      Nagel et al., arXiv 1906.04721, correct only the shift, without images.
    """
    target: Statistics = self.get_variable('targets', 'input')
    found = batch_statistics(sample_moments(h))
    ratio = jnp.clip(target.std / found.std, 1 / _LARGEST, _LARGEST)
    gain = scale * jax.lax.rsqrt(var + self.epsilon)
    bias += gain * (target.mean - mean - (found.mean - mean) * ratio)
    scale *= ratio
    self.put_variable('params', 'scale', scale)
    self.put_variable('params', 'bias', bias)
    return scale, bias


class QuantConv(_Quantized, float_layers.ConvBase):
  """Quantized convolution with bias, activation and output quantizer.

  Calibration reads the collection `targets`. Its entry `input` holds the
  statistics that the activation's input should have, [O] each; the bias takes
  the difference of the means.

  References:
    Nagel et al., arXiv 1906.04721, correct biases without images.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, I] to [B, H', W', O]."""
    kernel, bias = self.make_kernel(x), self.make_bias()
    quantized = self.quantize_weights(kernel, lambda: _inputs(self, x))
    h = channels.shift(self.convolve(x, quantized), bias)
    if self.calibrate and self.has_variable('targets', 'input'):
      target: Statistics = self.get_variable('targets', 'input')
      shift = target.mean - batch_statistics(sample_moments(h)).mean
      self.put_variable('params', 'bias', bias + shift)
      h += shift
    return self.quantize_output(functions.activate(h, self.act))


class QuantPReLU(_Quantized, float_layers.PReLU):
  """PReLU with a quantizer on its output."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] to the same shape."""
    return self.quantize_output(self.activate(x))


class QuantDense(_Quantized):
  """Dense layer with quantized weights and the params of `float_layers.Dense`.

  Attributes:
    features: number O of outputs.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Flattens x to [B, I] and maps it to [B, O]."""
    x = functions.flatten(x)
    kernel = self.param(
      'kernel', nn.initializers.lecun_normal(), (x.shape[-1], self.features)
    )
    bias = self.param('bias', nn.initializers.zeros, (self.features,))

    def inputs():
      return rounding.measure(lambda x: x[:, None], x[None])

    return self.quantize_output(
      x @ self.quantize_weights(kernel, inputs) + bias
    )


class _WithoutWeights(_Quantized, kw_only=True):
  """Layer without weights, with a quantizer on its output.

  Attributes:
    function: maps the layer's inputs to its output.
  """

  function: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, *inputs: jax.Array) -> jax.Array:
    """Applies the function and quantizes its output."""
    return self.quantize_output(self.function(*inputs))


def layer_set(
  plan: Plan,
  calibrate: bool = False,
  observe: bool = False,
  dtype: convolution.DType = None,
) -> protocol.LayerSet:
  """Returns the quantized layers.

  Args:
    plan: quantizers of the student.
    calibrate: whether layers set their steps; see `_Quantized`.
    observe: whether layers record the ranges of outputs; see `_Quantized`.
    dtype: dtype of convolutions; see `convolution.conv2d`.
  """
  plain = float_layers.layer_set()
  options: dict[str, Any] = {
    'plan': plan,
    'calibrate': calibrate,
    'observe': observe,
  }

  def quantized(layer):
    def factory(*args, name: str, **arguments):
      function = layer(*args, name=name, **arguments)
      return _WithoutWeights(function=function, name=name, **options)

    return factory

  def act(act, slope=protocol.SLOPE, *, name):
    if act == 'prelu':
      return QuantPReLU(name=name, **options)
    return quantized(plain.act)(act, slope, name=name)

  return protocol.LayerSet(
    input=quantized(plain.input),
    conv_bn=functools.partial(QuantConvBN, dtype=dtype, **options),
    conv=functools.partial(QuantConv, dtype=dtype, **options),
    dense=functools.partial(QuantDense, **options),
    act=act,
    add=quantized(plain.add),
    mul=quantized(plain.mul),
    concat=quantized(plain.concat),
    slice=plain.slice,
    shuffle=plain.shuffle,
    pad=plain.pad,
    pad_shortcut=plain.pad_shortcut,
    resize=plain.resize,
    max_pool=plain.max_pool,
    avg_pool=quantized(plain.avg_pool),
    global_avg_pool=quantized(plain.global_avg_pool),
  )
