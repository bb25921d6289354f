"""Images made by a formula: no data, no training, no two alike.

Dead leaves (Lee, Mumford and Huang, "Occlusion models for natural images",
IJCV 2001): shapes of all sizes that cover one another, which gives edges, flat
regions and a power spectrum like those of photographs; textured, as in Baradad
et al., "Learning to see by looking at noise" (arXiv 2106.05963).
"""

import jax
import jax.numpy as jnp
import numpy as np

_LEAVES = 64
_SQUARES = 0.4  # share of leaves; the others are ellipses
_LARGEST = 0.7  # radius, of the image's height
_CHROMA = 0.4  # spread of colours beside that of brightness
_TEXTURE = 0.35  # spread of a leaf's texture beside that of its colour


def _pink_noise(key: jax.Array, shape, slope: jax.Array) -> jax.Array:
  """Noise of amplitude 1 / frequency^slope, slope [B]; std 1, [B, H, W, C]."""
  _, height, width, _ = shape
  spectrum = jnp.fft.rfft2(jax.random.normal(key, shape), axes=(1, 2))
  rows = np.fft.fftfreq(height)[:, None]
  frequency = np.hypot(rows, np.fft.rfftfreq(width))
  frequency[0, 0] = np.inf  # no mean
  gain = frequency ** -slope[:, None, None]
  x = jnp.fft.irfft2(spectrum * gain[..., None], (height, width), axes=(1, 2))
  return x / (jnp.std(x, (1, 2), keepdims=True) + 1e-6)


def _colours(key: jax.Array, count: int, channels: int) -> jax.Array:
  """Colours of std 1 [count, 1, 1, channels], most of it brightness."""
  grey_key, key = jax.random.split(key)
  grey = jax.random.normal(grey_key, (count, 1, 1, 1))
  chroma = jax.random.normal(key, (count, 1, 1, channels))
  return (grey + _CHROMA * chroma) / np.hypot(1, _CHROMA)


def dead_leaves(
  key: jax.Array, count: int, shape: tuple[int, int, int]
) -> jax.Array:
  """Textured shapes that cover one another, lit unevenly.

  Args:
    key: PRNG key.
    count: B.
    shape: (H, W, C).

  Returns:
    [B, H, W, C] with a mean of about 0 and a standard deviation of about 1 per
    channel, as a classifier's normalised input has.
  """
  height, width, channels = shape
  keys = jax.random.split(key, 7)
  one, full = (count, 1, 1), (count, *shape)
  slope = jax.random.uniform(keys[0], (count,), minval=0.5, maxval=2.0)
  texture = _pink_noise(keys[1], (*full[:-1], 1), slope)
  texture += 0.3 * _pink_noise(keys[2], full, slope)
  palette = _colours(keys[3], count, channels)
  y = (jnp.arange(height)[:, None] + 0.5) / height
  x = (jnp.arange(width) + 0.5) / height
  smallest = max(1.3 / height, 0.015)  # a leaf has some pixels

  def paint(image, key):
    keys = jax.random.split(key, 8)
    dy = y - jax.random.uniform(keys[0], one)
    dx = x - jax.random.uniform(keys[1], one) * (width / height)
    # The density of radii falls with their square.
    u = jax.random.uniform(keys[2], one)
    radius = 1 / (1 / _LARGEST + u * (1 / smallest - 1 / _LARGEST))
    angle = jax.random.uniform(keys[3], one, maxval=np.pi)
    aspect = jnp.exp(0.5 * jax.random.normal(keys[4], one))
    p = (dx * jnp.cos(angle) + dy * jnp.sin(angle)) * aspect
    q = (dy * jnp.cos(angle) - dx * jnp.sin(angle)) / aspect
    square = jax.random.bernoulli(keys[5], _SQUARES, one)
    distance = jnp.where(
      square, jnp.maximum(abs(p), abs(q)), jnp.sqrt(p**2 + q**2)
    )
    # An edge is a pixel wide.
    cover = jnp.clip((radius - distance) * height + 0.5, 0, 1)[..., None]
    colour = 0.5 * palette + 0.87 * _colours(keys[6], count, channels)
    strength = _TEXTURE * abs(jax.random.normal(keys[7], (*one, 1)))
    return image + cover * (colour + strength * texture - image), None

  image, _ = jax.lax.scan(
    paint, palette + _TEXTURE * texture, jax.random.split(keys[4], _LEAVES)
  )
  light = _pink_noise(keys[5], (*full[:-1], 1), jnp.full((count,), 2.0))
  contrast = jnp.exp(0.3 * jax.random.normal(keys[6], (*one, 1)))
  return contrast * (image + 0.3 * light)
