"""The fake-quant layer set: the student.

It has the parameters and BatchNorm statistics of the float set, by name, and
the collection `quant`, see `quant/quantizers.py`. BatchNorm statistics are the
teacher's and frozen; gains and biases train. Formulas are in
`quant/numerics.py`, places and bits in `quant/plan.py`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clusterq_jax.layers import float_layers
from clusterq_jax.models import protocol
from clusterq_jax.ops import channels, convolution
from clusterq_jax.ops.moments import (
  Statistics,
  batch_statistics,
  sample_moments,
)
from clusterq_jax.quant import numerics, quantizers, rounding
from clusterq_jax.quant.plan import Output, Plan

# Correction of a gain, up or down: where few images wake a channel, a ratio of
# standard deviations says little.
_LARGEST = 2.0


class _Quantized(nn.Module, kw_only=True):
  """The quantizers that every quantized layer shares.

  Attributes:
    plan: every quantizer of the student.
    calibrate: sets the steps from the values that pass. Where steps are learned
      and `params` can be written, it also rounds the weights to keep the
      layer's outputs, and given the collection `targets` it corrects the
      BatchNorm, see `QuantConv`.
    observe: sows into `ranges` the step that the largest magnitude asks for.
  """

  plan: Plan
  calibrate: bool = False
  observe: bool = False

  @property
  def _own(self) -> Mapping[str, Any]:
    """This layer's part of `quant`."""
    return self.variables.get('quant', {})

  def _store(self, key: str, best: Callable[[], jax.Array]) -> None:
    """Keeps a variable of `quant`: as it is, or `best()` when calibrating."""
    variable = self.variable('quant', key, best)
    if self.calibrate:
      variable.value = best()

  def quantize_weights(
    self, kernel: jax.Array, patches: Callable[[], jax.Array]
  ) -> jax.Array:
    """Quantizes a kernel [..., O] with one step per output channel.

    Args:
      kernel: the weights.
      patches: returns the inputs that the kernel is multiplied with,
        [P, G, N], see `convolution.patches`.
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
    rounded = rounding.compensate(kernel, patches(), *grid)
    self.put_variable('params', 'kernel', rounded)
    return rounded

  def quantize_output(self, x: jax.Array) -> jax.Array:
    """Quantizes a tensor of any shape where the plan has a quantizer."""
    assert self.name is not None
    output = self.plan.output(self.name)
    if output is not None and output.step is None:
      self._calibrate_output(x, output)
    grid = quantizers.output_grid(self.plan, self.name, self._own)
    return x if grid is None else grid.quantize(x)

  def _calibrate_output(self, x: jax.Array, output: Output) -> None:
    if output.zero_point:
      # Traced twice, computed once: XLA merges equal searches.
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


class QuantConv(_Quantized, float_layers.ConvBase):
  """Quantized convolution, frozen BatchNorm, activation, output quantizer.

  The collection `targets`, which only calibration reads, holds as `input` the
  statistics that the BatchNorm's input should have, [O] each.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel, scale, bias, mean, var = self.make_variables(x)
    quantized = self.quantize_weights(
      kernel,
      lambda: convolution.patches(
        x, self.kernel, self.strides, self.padding, self.groups
      ),
    )
    h = self.convolve(x, quantized)
    if self.calibrate and self.has_variable('targets', 'input'):
      scale, bias = self._corrected(h, scale, bias, mean.value, var.value)
    gain = scale * jax.lax.rsqrt(var.value + self.epsilon)
    h = channels.scale_and_shift(h, gain, bias - mean.value * gain)
    return self.quantize_output(float_layers.activate(h, self.act))

  def _corrected(self, h, scale, bias, mean, var):
    """The gain and bias that give h the statistics it should have.

    Rounded weights and inputs shift and stretch every channel, at few bits so
    far that a network answers at random. Source: Nagel et al., arXiv
    1906.04721, which corrects the shift alone, computed without images.
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


class QuantDense(_Quantized):
  """Dense layer with quantized weights; params as `float.Dense`."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = float_layers.flatten(x)
    kernel = self.param(
      'kernel', nn.initializers.lecun_normal(), (x.shape[-1], self.features)
    )
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    return self.quantize_output(
      x @ self.quantize_weights(kernel, lambda: x[:, None]) + bias
    )


class _WithoutWeights(_Quantized, kw_only=True):
  """A function of tensors and a quantizer on what it gives."""

  function: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, *inputs: jax.Array) -> jax.Array:
    return self.quantize_output(self.function(*inputs))


def layer_set(
  plan: Plan,
  calibrate: bool = False,
  observe: bool = False,
  dtype: convolution.DType = None,
) -> protocol.LayerSet:
  """The quantized layers that `plan` describes; see `_Quantized`."""
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

  return protocol.LayerSet(
    input=quantized(plain.input),
    conv_bn=functools.partial(QuantConv, dtype=dtype, **options),
    dense=functools.partial(QuantDense, **options),
    add=quantized(plain.add),
    pad_shortcut=plain.pad_shortcut,
    max_pool=plain.max_pool,
    avg_pool=quantized(plain.avg_pool),
    global_avg_pool=quantized(plain.global_avg_pool),
  )
