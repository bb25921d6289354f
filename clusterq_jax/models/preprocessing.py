"""Conversion between images and the input of a network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """The input format that a teacher's weights expect.

  Network input = (pixels / 255 * pixel_range - mean) / std, for each channel.

  Attributes:
    image_size: (H, W) in pixels.
    mean: mean of each channel, in the units of `pixel_range`.
    std: standard deviation of each channel, in the units of `pixel_range`.
    pixel_range: value of a white pixel before mean and std: 1 or 255.
    channel_order: 'rgb', 'bgr' or 'grey'; images are always stored RGB.
  """

  image_size: tuple[int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  pixel_range: float = 1.0
  channel_order: str = 'rgb'

  @property
  def shape(self) -> tuple[int, int, int]:
    """Returns the shape of one image, (H, W, C)."""
    return (*self.image_size, len(self.mean))

  def _reorder(self, x):
    return x[..., ::-1] if self.channel_order == 'bgr' else x

  def normalize(self, pixels: jax.Array) -> jax.Array:
    """Converts uint8 RGB [..., C] to network input, float32 [..., C]."""
    x = self._reorder(pixels).astype(jnp.float32)
    x = x * (self.pixel_range / 255)
    return (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)

  def to_pixels(self, x: jax.Array) -> jax.Array:
    """Inverts `normalize`; rounds and clips to uint8 [..., C]."""
    x = x * jnp.asarray(self.std) + jnp.asarray(self.mean)
    x = jnp.round(x * (255 / self.pixel_range))
    return self._reorder(jnp.clip(x, 0, 255).astype(jnp.uint8))

  @property
  def limit(self) -> float:
    """Returns the largest magnitude of a black or white pixel as input."""
    mean, std = np.asarray(self.mean), np.asarray(self.std)
    white = (self.pixel_range - mean) / std
    return float(np.max(np.abs([-mean / std, white])))
