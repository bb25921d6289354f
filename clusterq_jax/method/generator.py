"""The conditional generator G(z | y) of GDFQ, with prototypes as an extension.

GDFQ's generator for small images computes:

    embedding(y) * z -> dense -> [H/4, W/4] -> BatchNorm
    -> upsample x2 -> conv -> BatchNorm -> leaky ReLU
    -> upsample x2 -> conv -> BatchNorm -> leaky ReLU
    -> conv -> tanh -> BatchNorm without gain and bias

The last BatchNorm gives the images the scale of the teacher's normalised input.
GDFQ's generator for ImageNet has no embedding. Its BatchNorms have a gain and a
bias for each class (conditional BatchNorm).

Prototypes are this project's extension: several embeddings for each class,
concatenated with z. With conditional BatchNorm, each prototype also has its own
gains. On 100 classes, the teacher recognised the requested class in

    0 %   of the images with embedding(y) * z, after 275 steps,
    75 %  of the images with prototypes, after 400 steps,
    97 %  of the images with prototypes and conditional BatchNorm, 400 steps.

Without conditional BatchNorm, all images have similar colours.

BatchNorm uses the statistics of the batch both in training and afterwards. So
later images have the same distribution as the optimised images.

References:
  Xu et al., GDFQ, arXiv 2003.03603.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clusterq_jax.ops import channels, convolution

_EPSILON = 1e-5
_SLOPE = 0.2
# U(-1, 1) / sqrt(fan-in). BatchNorm removes the weights' scale. Only their
# ratio to Adam's steps matters: wider initial weights learn more slowly.
_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class _BatchNorm(nn.Module):
  """BatchNorm with the statistics of the batch.

  Attributes:
    gains: number N of gains and biases for each channel, [N, C], or [C] if
      N = 1. With 0 there are none.
  """

  gains: int = 1

  @nn.compact
  def __call__(self, x, kind=None):
    """Normalizes x [B, H, W, C]; kind, int [B], chooses among N > 1 gains."""
    pixels = x.size // x.shape[-1]
    mean = channels.total(x) / pixels
    mean_square = channels.total(jnp.square(x)) / pixels
    gain = jax.lax.rsqrt(jnp.maximum(mean_square - mean**2, 0.0) + _EPSILON)
    if not self.gains:
      return channels.scale_and_shift(x, gain, -mean * gain)
    shape = mean.shape if self.gains == 1 else (self.gains, *mean.shape)
    scale = self.param('scale', nn.initializers.ones, shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    if self.gains > 1:
      scale, bias = scale[kind][:, None, None], bias[kind][:, None, None]
    gain *= scale
    shift = bias - mean * gain
    if self.gains > 1:
      return x * gain + shift
    return channels.scale_and_shift(x, gain, shift)


# A 3-tap filter on an image upsampled by repetition sees two low-resolution
# neighbours. Entry [parity, neighbour, tap] is 1 if the tap sees the neighbour.
_TAPS = np.array(
  [
    [[1, 0, 0], [0, 1, 1]],  # neighbours: previous pixel, same pixel
    [[1, 1, 0], [0, 0, 1]],  # neighbours: same pixel, next pixel
  ],
  np.float32,
)


def upsample_conv(
  x: jax.Array, kernel: jax.Array, dtype: convolution.DType = None
) -> jax.Array:
  """Upsamples x by 2 (nearest neighbour) and convolves it with a 3x3 kernel.

  The convolution runs at the low resolution, for all four pixel parities at
  once. Each parity sees 2x2 neighbours, so 16 products replace 36.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, C, F].
    dtype: dtype of the convolution; see `convolution.conv2d`.

  Returns:
    The convolution with 'same' padding, [B, 2H, 2W, F].
  """
  b, h, w, c = x.shape
  features = kernel.shape[-1]
  taps = jnp.einsum('pah,qbw,hwcf->abcpqf', _TAPS, _TAPS, kernel)
  taps = taps.reshape(2, 2, c, 4 * features)
  y = convolution.conv2d(x, taps, 1, 1, dtype=dtype)  # [B, H + 1, W + 1, 4F]
  y = y.reshape(b, h + 1, w + 1, 2, 2, features)
  rows = [
    jnp.stack([y[:, p : p + h, q : q + w, p, q] for q in (0, 1)], 3)
    for p in (0, 1)
  ]
  return jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, features)


class _Conv(nn.Module):
  """3x3 convolution without bias, with or without upsampling before it."""

  features: int
  upsample: bool = False
  dtype: convolution.DType = None

  @nn.compact
  def __call__(self, x):
    shape = (3, 3, x.shape[-1], self.features)
    kernel = self.param('kernel', _INIT, shape)
    if self.upsample:
      return upsample_conv(x, kernel, self.dtype)
    return convolution.conv2d(x, kernel, 1, 1, dtype=self.dtype)


class Generator(nn.Module):
  """Generator of images in the teacher's normalised input space.

  Attributes:
    shape: (H, W, C) of the images.
    num_classes: K.
    latent_dim: length of the noise z.
    channels: channels of the feature maps. Each map has twice the height and
      width of the map before. The paper has (128, 128, 64).
    conditional: whether BatchNorms have a gain and a bias for each class, or
      for each prototype. Without prototypes, they replace the embedding.
    prototypes: number of embeddings for each class; z chooses one of them. 0 is
      GDFQ's generator.
    dtype: dtype of convolutions; see `convolution.conv2d`.
  """

  shape: tuple[int, int, int]
  num_classes: int
  latent_dim: int = 100
  channels: tuple[int, ...] = (128, 128, 64)
  conditional: bool = False
  prototypes: int = 0
  dtype: convolution.DType = None

  @nn.compact
  def __call__(self, z: jax.Array, labels: jax.Array) -> jax.Array:
    """Generates images [B, H, W, C] of z [B, latent_dim], labels int [B]."""
    height, width, depth = self.shape
    scale = 2 ** (len(self.channels) - 1)
    h, w = -(-height // scale), -(-width // scale)
    kind, kinds = labels, self.num_classes
    if self.prototypes:
      # z[:, 0] is normal, so its distribution function makes it uniform and all
      # prototypes equally likely.
      uniform = jax.scipy.special.ndtr(z[:, 0])
      chosen = jnp.minimum(
        (uniform * self.prototypes).astype(int), self.prototypes - 1
      )
      kind = labels * self.prototypes + chosen
      kinds *= self.prototypes
      z = jnp.concatenate([z, self._embed(kind, kinds)], -1)
    elif not self.conditional:
      z *= self._embed(kind, kinds)
    gains = kinds if self.conditional else 1
    dense = nn.Dense(h * w * self.channels[0], kernel_init=_INIT, name='dense')
    x = dense(z).reshape(-1, h, w, self.channels[0])
    x = _BatchNorm(gains, name='bn0')(x, kind)
    for i, features in enumerate(self.channels[1:], 1):
      x = _Conv(features, True, self.dtype, name=f'conv{i}')(x)
      x = nn.leaky_relu(_BatchNorm(gains, name=f'bn{i}')(x, kind), _SLOPE)
    x = _Conv(depth, dtype=self.dtype, name='conv_out')(x)
    x = jnp.tanh(x + self.param('bias_out', nn.initializers.zeros, (depth,)))
    return _BatchNorm(gains=0, name='bn_out')(x[:, :height, :width])

  def _embed(self, kind: jax.Array, kinds: int) -> jax.Array:
    return nn.Embed(
      kinds,
      self.latent_dim,
      embedding_init=nn.initializers.normal(1.0),
      name='embedding',
    )(kind)
