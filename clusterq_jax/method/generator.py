"""The conditional generator G(z | y) of GDFQ (Xu et al. 2020).

For small images: embedding(y) * z -> dense -> H/4 x W/4 -> BN -> x2 -> conv,
BN, leaky ReLU -> x2 -> conv, BN, leaky ReLU -> conv -> tanh -> BN without gain
and bias, which gives the images the scale of the teacher's normalised input.
For ImageNet: z -> dense directly, and BatchNorms with a gain and a bias per
class. Prototypes are this project's: some embeddings per class that stand
beside z, with BatchNorm gains of their own where it is conditional. Asked for
100 classes, a product of embedding and z was right on no image after 275 steps;
prototypes on 75 % of a batch after 400, with conditional BatchNorm on 97 %.
Without it, all images share their colours.
More channels than three mean more doublings, from a smaller start.

BatchNorm always uses the statistics of the batch, in training and after it, so
there is no second mode in which images differ from those that were optimised.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clusterq_jax.ops import channels, convolution

_EPSILON = 1e-5
_SLOPE = 0.2
# U(-1, 1) / sqrt(fan-in). BatchNorm makes the scale a matter of how far Adam's
# steps reach: wider initial weights learn more slowly.
_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class _BatchNorm(nn.Module):
  """gains: 1, or N for gains and biases [N, C]; 0: neither."""

  gains: int = 1

  @nn.compact
  def __call__(self, x, kind=None):
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


# Which taps of a 3-tap filter fall on which of two low-resolution neighbours as
# it runs over an image upsampled by repetition: [parity, neighbour, tap].
_TAPS = np.array(
  [
    [[1, 0, 0], [0, 1, 1]],  # the one before, and the pixel itself
    [[1, 1, 0], [0, 0, 1]],  # the pixel itself, and the one after
  ],
  np.float32,
)


def upsample_conv(
  x: jax.Array, kernel: jax.Array, dtype: convolution.DType = None
) -> jax.Array:
  """3x3 'same' convolution of the nearest-neighbour x2 upsampling of x.

  Computed at the low resolution, for the four pixel parities at once: each sees
  2x2 neighbours, so 16 products take the place of 36.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, C, F].
    dtype: as in `convolution.conv2d`.

  Returns:
    [B, 2H, 2W, F].
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
  """Noise and labels to images in the teacher's normalised input space.

  Attributes:
    shape: (H, W, C) of the images.
    num_classes: K.
    latent_dim: length of z.
    channels: of the feature maps, each but the first at twice the height and
      width of the one before; (128, 128, 64) is the paper's.
    conditional: BatchNorm instead of the embedding tells the class; with
      prototypes, it too, and which of them.
    prototypes: embeddings per class, beside z instead of in a product with it;
      z chooses one. 0: the paper's ways.
    dtype: what convolutions compute in, see `convolution.conv2d`.
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
    """z [B, latent_dim] and labels int [B] to images [B, H, W, C]."""
    height, width, depth = self.shape
    scale = 2 ** (len(self.channels) - 1)
    h, w = -(-height // scale), -(-width // scale)
    kind, kinds = labels, self.num_classes
    if self.prototypes:
      # Equally likely, by the normal distribution of z.
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
