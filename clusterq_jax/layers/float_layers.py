"""The float layers, which make the teacher.

Every `conv_bn` can record the moments of its BatchNorm input in the collection
`moments`, for each sample and channel. All class and batch statistics of the
method (eqs. 4-9) follow from these moments, so the feature maps need not stay
in memory.

References:
  Gao et al., ClusterQ, arXiv 2205.00179.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from clusterq_jax.models import protocol
from clusterq_jax.models.graph import Graph
from clusterq_jax.ops import convolution
from clusterq_jax.ops.moments import Moments, sample_moments

RELU6 = 6.0
_PRETRAIN_MOMENTUM = 0.9  # decay of the moving averages, per step


def activate(x: jax.Array, act: protocol.Activation) -> jax.Array:
  """Applies an activation; None returns x."""
  if act == 'relu6':
    return jnp.clip(x, 0, RELU6)
  return jax.nn.relu(x) if act == 'relu' else x


def pad_channels(
  x: jax.Array, features: int, strides: int, zero: int = 0
) -> jax.Array:
  """Subsamples pixels and pads channels on both sides.

  Args:
    x: [B, H, W, C].
    features: number of output channels.
    strides: distance in pixels between kept pixels, in both directions.
    zero: value of the new channels.

  Returns:
    [B, ceil(H / strides), ceil(W / strides), features].
  """
  before = (features - x.shape[-1]) // 2
  after = features - x.shape[-1] - before
  x = x[:, ::strides, ::strides]
  return jnp.pad(
    x, ((0, 0), (0, 0), (0, 0), (before, after)), constant_values=zero
  )


def max_pool(
  x: jax.Array, kernel: int, strides: int, padding: int
) -> jax.Array:
  """Returns the largest value of each square window.

  Args:
    x: [B, H, W, C].
    kernel: side of the window in pixels.
    strides: step in both directions in pixels.
    padding: pixels on each side; they are never the largest.
  """
  return nn.max_pool(
    x, (kernel, kernel), (strides, strides), ((padding, padding),) * 2
  )


def avg_pool(x: jax.Array, kernel: int, strides: int) -> jax.Array:
  """Returns the mean of each square window, without padding.

  Args:
    x: [B, H, W, C].
    kernel: side of the window in pixels.
    strides: step in both directions in pixels.
  """
  return nn.avg_pool(x, (kernel, kernel), (strides, strides))


def flatten(x: jax.Array) -> jax.Array:
  """Flattens in torch's order: channel, row, column.

  Args:
    x: [B, C] or [B, H, W, C].

  Returns:
    [B, C] or [B, C * H * W].
  """
  return jax.lax.collapse(jnp.moveaxis(x, -1, 1), 1)


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
  """Base of the float and the quantized convolution with BatchNorm.

  Attributes:
    features: number of output channels.
    kernel: side of the kernel in pixels.
    strides: step in both directions in pixels.
    padding: see `convolution.Padding`.
    groups: number of channel groups.
    act: activation after the BatchNorm.
    epsilon: summand of the variance in the BatchNorm.
    dtype: dtype of the convolution; see `convolution.conv2d`.
  """

  features: int
  kernel: int
  strides: int = 1
  padding: protocol.Padding = None
  groups: int = 1
  act: protocol.Activation = None
  epsilon: float = protocol.EPSILON
  dtype: convolution.DType = None

  def make_variables(self, x: jax.Array) -> ConvVariables:
    """Declares the variables for inputs x, [B, H, W, I]."""
    shape = (self.kernel, self.kernel, x.shape[-1] // self.groups)
    channels = (self.features,)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    return ConvVariables(
      self.param('kernel', nn.initializers.he_normal(), (*shape, *channels)),
      self.param('scale', ones, channels),
      self.param('bias', zeros, channels),
      self.variable('batch_stats', 'mean', jnp.zeros, channels),
      self.variable('batch_stats', 'var', jnp.ones, channels),
    )

  def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [B, H, W, I] with a kernel, to [B, H', W', O]."""
    return convolution.conv2d(
      x, kernel, self.strides, self.padding, self.groups, self.dtype
    )


class ConvBN(ConvBase):
  """Convolution, BatchNorm and activation.

  Attributes:
    train: whether the BatchNorm uses and updates batch statistics.
    tap: whether the moments of the BatchNorm's input are sown into `moments`.
  """

  train: bool = False
  tap: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, I] to [B, H', W', O]."""
    kernel, scale, bias, mean, var = self.make_variables(x)
    h = self.convolve(x, kernel)
    if self.tap:
      self.sow(
        'moments',
        'input',
        sample_moments(h),
        reduce_fn=lambda _, new: new,
        init_fn=lambda: None,
      )
    m, v = mean.value, var.value
    if self.train:
      m, v = jnp.mean(h, (0, 1, 2)), jnp.var(h, (0, 1, 2))
      if not self.is_initializing():
        for stored, new in ((mean, m), (var, v)):
          stored.value += (1 - _PRETRAIN_MOMENTUM) * (new - stored.value)
    gain = scale * jax.lax.rsqrt(v + self.epsilon)
    return activate(h * gain + (bias - m * gain), self.act)


class Dense(nn.Module):
  """Dense layer with the params `kernel` [I, O] and `bias` [O].

  Attributes:
    features: number O of outputs.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Flattens x to [B, I] and maps it to [B, O]."""
    x = flatten(x)
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
    tap: whether convolutions record the moments of BatchNorm inputs.
    dtype: dtype of convolutions; see `convolution.conv2d`.
  """

  def no_weights(function):
    # Layers without variables need no module, only the factory's signature.
    def factory(*args, name: str, **kwargs):
      del name
      return functools.partial(function, *args, **kwargs)

    return factory

  return protocol.LayerSet(
    input=no_weights(lambda x: x),
    conv_bn=functools.partial(ConvBN, train=train, tap=tap, dtype=dtype),
    dense=Dense,
    add=no_weights(lambda x, y, act=None: activate(x + y, act)),
    pad_shortcut=no_weights(pad_channels),
    max_pool=no_weights(max_pool),
    avg_pool=no_weights(avg_pool),
    global_avg_pool=no_weights(lambda x: jnp.mean(x, (1, 2))),
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
