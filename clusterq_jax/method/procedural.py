"""Procedural images: random shapes, without data or training.

The dead leaves model paints shapes of all sizes that occlude one another. Such
images have edges, flat regions and a power spectrum like photographs. Here the
shapes are also textured.

References:
  Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001.
  Baradad et al., "Learning to see by looking at noise", arXiv 2106.05963.
"""

import jax
import jax.numpy as jnp
import numpy as np

_LEAVES = 64  # shapes in each image
_SQUARES = 0.4  # fraction of squares among the shapes; the others are ellipses
_LARGEST = 0.7  # largest radius, in units of the image's height
_CHROMA = 0.4  # spread of the channels relative to the spread of brightness
_TEXTURE = 0.35  # spread of textures relative to the spread of colours


def _pink_noise(key: jax.Array, shape, slope: jax.Array) -> jax.Array:
  """Draws noise whose amplitude falls with frequency.

  Args:
    key: PRNG key.
    shape: (B, H, W, C).
    slope: exponent of each image, [B]; the amplitude is 1 / frequency^slope.

  Returns:
    [B, H, W, C]; each channel of an image has mean 0 and standard deviation 1.
  """
  _, height, width, _ = shape
  spectrum = jnp.fft.rfft2(jax.random.normal(key, shape), axes=(1, 2))
  rows = np.fft.fftfreq(height)[:, None]
  frequency = np.hypot(rows, np.fft.rfftfreq(width))
  frequency[0, 0] = np.inf  # makes the mean 0
  gain = frequency ** -slope[:, None, None]
  x = jnp.fft.irfft2(spectrum * gain[..., None], (height, width), axes=(1, 2))
  return x / (jnp.std(x, (1, 2), keepdims=True) + 1e-6)


def _colours(key: jax.Array, count: int, channels: int) -> jax.Array:
  """Draws colours [count, 1, 1, channels] that differ mostly in brightness."""
  grey_key, key = jax.random.split(key)
  grey = jax.random.normal(grey_key, (count, 1, 1, 1))
  chroma = jax.random.normal(key, (count, 1, 1, channels))
  return (grey + _CHROMA * chroma) / np.hypot(1, _CHROMA)


def dead_leaves(
  key: jax.Array, count: int, shape: tuple[int, int, int]
) -> jax.Array:
  """Draws images of textured shapes that occlude one another in uneven light.

  Args:
    key: PRNG key.
    count: number B of images.
    shape: (H, W, C).

  Returns:
    [B, H, W, C]. Each channel has a mean of about 0 and a standard deviation of
    about 1, like the normalised input of a classifier.
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
  smallest = max(1.3 / height, 0.015)  # a radius of at least 1.3 pixels

  def paint(image, key):
    keys = jax.random.split(key, 8)
    dy = y - jax.random.uniform(keys[0], one)
    dx = x - jax.random.uniform(keys[1], one) * (width / height)
    # The density of radii is proportional to 1 / radius^2.
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
    # Edges are one pixel wide.
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
