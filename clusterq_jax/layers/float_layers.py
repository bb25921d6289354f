"""The float layers, which make the teacher.

Every `conv_bn` can record the moments of its BatchNorm input in the collection
`moments`, for each sample and channel. Every `conv` can record those of its
output. All class and batch statistics of the method (eqs. 4-9) follow from
these moments, so the feature maps need not stay in memory.

References:
  Gao et al., ClusterQ, arXiv 2205.00179.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from clusterq_jax.layers import functions
from clusterq_jax.models import protocol
from clusterq_jax.models.graph import Graph
from clusterq_jax.ops import convolution
from clusterq_jax.ops.moments import Moments, sample_moments

_PRETRAIN_MOMENTUM = 0.9  # decay of the moving averages, per step


class ConvVariables(NamedTuple):
  """The variables of a convolution with BatchNorm.

  Attributes:
    kernel: [kh, kw, I / groups, O].
    scale: gain of the BatchNorm, [O].
    bias: bias of the BatchNorm, [O].
    mean: Flax variable with the stored mean, [O].
    var: Flax variable with the stored variance, [O].
  """

  kernel: jax.Array
  scale: jax.Array
  bias: jax.Array
  mean: nn.Variable
  var: nn.Variable


class ConvBase(nn.Module):
  """Base of the float and the quantized convolutions.

  Attributes:
    features: number of output channels.
    kernel: size of the kernel in pixels.
    strides: step in both directions in pixels.
    padding: see `convolution.Padding`.
    dilation: distance between the kernel's taps in pixels.
    groups: number of channel groups.
    act: activation of the output.
    dtype: dtype of the convolution; see `convolution.conv2d`.
  """

  features: int
  kernel: protocol.Window
  strides: int = 1
  padding: protocol.Padding = None
  dilation: int = 1
  groups: int = 1
  act: protocol.Clipping = None
  dtype: convolution.DType = None

  def make_kernel(self, x: jax.Array) -> jax.Array:
    """Declares the kernel for inputs x, [B, H, W, I]."""
    size = convolution.window(self.kernel)
    shape = *size, x.shape[-1] // self.groups, self.features
    return self.param('kernel', nn.initializers.he_normal(), shape)

  def make_bias(self) -> jax.Array:
    """Declares the bias."""
    return self.param('bias', nn.initializers.zeros, (self.features,))

  def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [B, H, W, I] with a kernel, to [B, H', W', O]."""
    return convolution.conv2d(
      x,
      kernel,
      self.strides,
      self.padding,
      self.groups,
      self.dtype,
      self.dilation,
    )

  def patches(self, x: jax.Array) -> jax.Array:
    """Returns the kernel's inputs for x [B, H, W, I]; see `ops.convolution`."""
    return convolution.patches(
      x,
      convolution.window(self.kernel),
      self.strides,
      self.padding,
      self.groups,
      self.dilation,
    )

  def tap(self, h: jax.Array) -> None:
    """Sows the moments of h [B, H, W, O] into `moments`."""
    self.sow(
      'moments',
      'input',
      sample_moments(h),
      reduce_fn=lambda _, new: new,
      init_fn=lambda: None,
    )


class BatchNormBase(ConvBase):
  """Base of the convolutions with BatchNorm.

  Attributes:
    epsilon: summand of the variance in the BatchNorm.
  """

  epsilon: float = protocol.EPSILON

  def make_variables(self, x: jax.Array) -> ConvVariables:
    """Declares the variables for inputs x, [B, H, W, I]."""
    channels = (self.features,)
    return ConvVariables(
      self.make_kernel(x),
      self.param('scale', nn.initializers.ones, channels),
      self.make_bias(),
      self.variable('batch_stats', 'mean', jnp.zeros, channels),
      self.variable('batch_stats', 'var', jnp.ones, channels),
    )


class ConvBN(BatchNormBase):
  """Convolution, BatchNorm and activation.

  Attributes:
    train: whether the BatchNorm uses and updates batch statistics.
    taps: whether the moments of the BatchNorm's input are sown into `moments`.
  """

  train: bool = False
  taps: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, I] to [B, H', W', O]."""
    kernel, scale, bias, mean, var = self.make_variables(x)
    h = self.convolve(x, kernel)
    if self.taps:
      self.tap(h)
    m, v = mean.value, var.value
    if self.train:
      m, v = jnp.mean(h, (0, 1, 2)), jnp.var(h, (0, 1, 2))
      if not self.is_initializing():
        for stored, new in ((mean, m), (var, v)):
          stored.value += (1 - _PRETRAIN_MOMENTUM) * (new - stored.value)
    gain = scale * jax.lax.rsqrt(v + self.epsilon)
    return functions.activate(h * gain + (bias - m * gain), self.act)


class Conv(ConvBase):
  """Convolution with bias, and activation.

  Attributes:
    taps: whether the moments of the activation's input are sown into `moments`.
  """

  taps: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, I] to [B, H', W', O]."""
    kernel, bias = self.make_kernel(x), self.make_bias()
    h = self.convolve(x, kernel) + bias
    if self.taps:
      self.tap(h)
    return functions.activate(h, self.act)


class PReLU(nn.Module):
  """ReLU with a learned slope below zero, params `slope` [C]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] to the same shape."""
    return self.activate(x)

  def activate(self, x: jax.Array) -> jax.Array:
    """Declares the slope and applies the activation to x [B, H, W, C]."""
    constant = nn.initializers.constant(0.25)  # torch's
    return functions.activate(
      x, 'prelu', self.param('slope', constant, x.shape[-1:])
    )


class Dense(nn.Module):
  """Dense layer with the params `kernel` [I, O] and `bias` [O].

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
    return x @ kernel + bias


def layer_set(
  train: bool = False, tap: bool = False, dtype: convolution.DType = None
) -> protocol.LayerSet:
  """Returns the float layers.

  Args:
    train: whether BatchNorms use and update batch statistics (pretraining).
    tap: whether convolutions record the moments of their BatchNorm's input, or
      of their output if they have none.
    dtype: dtype of convolutions; see `convolution.conv2d`.
  """

  def no_weights(function):
    # Layers without variables need no module, only the factory's signature.
    def factory(*args, name: str, **kwargs):
      del name
      return functools.partial(function, *args, **kwargs)

    return factory

  def act(act, slope=protocol.SLOPE, *, name):
    if act == 'prelu':
      return PReLU(name=name)
    return functools.partial(functions.activate, act=act, slope=slope)

  return protocol.LayerSet(
    input=no_weights(lambda x: x),
    conv_bn=functools.partial(ConvBN, train=train, taps=tap, dtype=dtype),
    conv=functools.partial(Conv, taps=tap, dtype=dtype),
    dense=Dense,
    act=act,
    add=no_weights(lambda x, y, act=None: functions.activate(x + y, act)),
    mul=no_weights(lambda x, y: x * y),
    concat=no_weights(lambda *inputs: jnp.concatenate(inputs, -1)),
    slice=no_weights(lambda x, start, stop: x[..., start:stop]),
    shuffle=no_weights(functions.shuffle),
    pad=no_weights(functions.pad),
    pad_shortcut=no_weights(functions.pad_channels),
    resize=no_weights(functions.resize),
    max_pool=no_weights(functions.max_pool),
    avg_pool=no_weights(functions.avg_pool),
    global_avg_pool=no_weights(lambda x: jnp.mean(x, (1, 2), keepdims=True)),
  )


def ordered_moments(collections: Any, graph: Graph) -> tuple[Moments, ...]:
  """Returns the recorded moments in forward order.

  Args:
    collections: the collections that the network wrote, with `moments`.
    graph: wiring of the network.

  Returns:
    Moments [B, C_l] of each BatchNorm l.
  """
  # Flax sorts the keys of a collection by name.
  return tuple(
    collections['moments'][name]['input'] for name in graph.batch_norms
  )
