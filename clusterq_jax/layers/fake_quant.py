"""The fake-quant layer set: the student.

The same parameters and BatchNorm statistics as the float set, by name, plus the
collection `quant`: the logarithm of each quantizer's step (a step is positive,
and its useful changes are relative), but of those that the plan fixes; and the
zero points, which do not train.
BatchNorm statistics are the teacher's, frozen; its gain and bias train.
Formulas are in `quant/numerics.py`, places and bits in `quant/plan.py`.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clusterq_jax.layers import float_layers
from clusterq_jax.models import protocol
from clusterq_jax.ops import channels, convolution
from clusterq_jax.ops.moments import (
  Statistics,
  batch_statistics,
  sample_moments,
)
from clusterq_jax.quant import numerics, rounding
from clusterq_jax.quant.plan import Plan

# Correction of a gain, up or down: where few images wake a channel, a ratio of
# standard deviations says little.
_LARGEST = 2.0


def settle(plan: Plan, student: Any) -> dict[str, Any]:
  """The student's params with every kernel on its grid.

  The same network, wherever it runs: training leaves some weights so near the
  middle between two codes that the last bit of a step, which differs between
  machines, would decide. One such weight was seen to change 2.6 % of answers.

  Args:
    plan: every quantizer of the student.
    student: {'params', 'quant'}.
  """
  params = dict(student['params'])
  for name, bits in plan.weights:
    kernel, (low, high) = params[name]['kernel'], numerics.weight_range(bits)
    if plan.learned:
      step = jnp.exp(student['quant'][name]['weights'])
    else:
      step = numerics.max_step(kernel, high, tuple(range(kernel.ndim - 1)))
    settled = numerics.fake_quant(kernel, step, low, high)
    params[name] = {**params[name], 'kernel': settled}
  return params


def widen(
  plan: Plan, quant: Any, layers: Collection[str], headroom: float
) -> dict[str, Any]:
  """The student's quant with wider ranges of activations in some layers.

  Real images reach further than synthetic ones of the same statistics, the more
  so the later the layer: in the last ones of a CIFAR-100 network clipping had
  twice the share in their quantization error.

  Args:
    plan: every quantizer of the student.
    quant: its collection.
    layers: whose ranges become wider; not where the plan fixes them.
    headroom: 0.1 makes them 10 % wider.
  """
  wider = dict(quant)
  for name, output in plan.outputs:
    if name in layers and output.step is None:
      log_step = quant[name]['output'] + np.float32(np.log1p(headroom))
      wider[name] = {**quant[name], 'output': log_step}
  return wider


class _Quantized(nn.Module):
  """What every quantized layer shares.

  Attributes:
    plan: every quantizer of the student.
    calibrate: set the steps from the values that pass, into `quant`. Where
      steps are learned and `params` can be written, round the weights such that
      the layers keep their outputs; given the collection `targets`, see
      `QuantConv`, correct the BatchNorms too.
    observe: sow the step that the values that pass would want, by largest
      magnitude, into `ranges`.
  """

  plan: Plan
  calibrate: bool = False
  observe: bool = False

  def _quantize(self, x, key: str, low: int, high: int, axes) -> jax.Array:
    def best():
      if self.plan.learned:
        return jnp.log(numerics.mse_step(x, low, high, axes))
      return jnp.log(numerics.max_step(x, high, axes))

    log_step = self.variable('quant', key, best)
    if self.calibrate:
      log_step.value = best()
    return numerics.fake_quant(x, jnp.exp(log_step.value), low, high)

  def quantize_weights(
    self, kernel: jax.Array, patches: Callable[[], jax.Array]
  ) -> jax.Array:
    """Per output channel, the last axis of kernel [..., O].

    patches: what gives the inputs that the kernel is multiplied with,
      [P, G, N], as `convolution.patches`.
    """
    assert self.name is not None
    low, high = numerics.weight_range(self.plan.weight_bits(self.name))
    axes = tuple(range(kernel.ndim - 1))
    if self.plan.learned:
      quantized = self._quantize(kernel, 'weights', low, high, axes)
      if self.calibrate and self.is_mutable_collection('params'):
        step = jnp.exp(self.get_variable('quant', 'weights'))
        quantized = rounding.compensate(kernel, patches(), step, low, high)
        self.put_variable('params', 'kernel', quantized)
      return quantized
    step = jax.lax.stop_gradient(numerics.max_step(kernel, high, axes))
    return numerics.fake_quant(kernel, step, low, high)

  def quantize_output(self, x: jax.Array) -> jax.Array:
    """Per tensor, where the plan has a quantizer; x of any shape."""
    assert self.name is not None
    output = self.plan.output(self.name)
    if output is None:
      return x
    if output.zero_point:
      return self._quantize_shifted(x, output)
    low, high = output.codes()
    if output.step is not None:
      return numerics.fake_quant(x, jnp.float32(output.step), low, high)
    axes = tuple(range(x.ndim))
    if self.observe:
      self.sow(
        'ranges',
        'output',
        jnp.log(numerics.max_step(jax.lax.stop_gradient(x), high, axes)),
        reduce_fn=lambda _, new: new,
        init_fn=lambda: None,
      )
    return self._quantize(x, 'output', low, high, axes)

  def _quantize_shifted(self, x, output):
    def best():
      step, zero = numerics.mse_zero_point(x, output.bits)
      return jnp.log(step), zero

    log_step = self.variable('quant', 'output', lambda: best()[0])
    zero = self.variable('quant', 'zero_point', lambda: best()[1])
    if self.calibrate:
      log_step.value, zero.value = best()
    return numerics.fake_quant(
      x, jnp.exp(log_step.value), *output.codes(zero.value)
    )


class QuantConv(_Quantized):
  """Quantized convolution, frozen BatchNorm, activation, output quantizer.

  Variables as `float.ConvBN`; quant `weights` [O] (learned steps only) and
  `output` []; targets `input`: what the statistics of the BatchNorm's input
  should be while it calibrates, [O] each.
  """

  features: int = 0
  kernel: int = 1
  strides: int = 1
  padding: protocol.Padding = None
  groups: int = 1
  act: protocol.Activation = None
  epsilon: float = protocol.EPSILON
  dtype: convolution.DType = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.kernel, self.kernel, x.shape[-1] // self.groups)
    kernel = self.param(
      'kernel', nn.initializers.he_normal(), (*shape, self.features)
    )
    scale = self.param('scale', nn.initializers.ones, (self.features,))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    mean = self.variable('batch_stats', 'mean', jnp.zeros, (self.features,))
    var = self.variable('batch_stats', 'var', jnp.ones, (self.features,))
    h = convolution.conv2d(
      x,
      self.quantize_weights(
        kernel,
        lambda: convolution.patches(
          x, self.kernel, self.strides, self.padding, self.groups
        ),
      ),
      self.strides,
      self.padding,
      self.groups,
      self.dtype,
    )
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

  features: int = 0

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

  def quantized(layer):
    def factory(*args, name: str, **options):
      return _WithoutWeights(
        plan,
        calibrate,
        observe,
        function=layer(*args, name=name, **options),
        name=name,
      )

    return factory

  return protocol.LayerSet(
    input=quantized(plain.input),
    conv_bn=functools.partial(QuantConv, plan, calibrate, observe, dtype=dtype),
    dense=functools.partial(QuantDense, plan, calibrate, observe),
    add=quantized(plain.add),
    pad_shortcut=plain.pad_shortcut,
    max_pool=plain.max_pool,
    avg_pool=quantized(plain.avg_pool),
    global_avg_pool=quantized(plain.global_avg_pool),
  )
