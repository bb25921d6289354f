"""What a network's weights expect of their input images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What a teacher's weights expect of their input.

  Network input = (pixels / 255 * pixel_range - mean) / std, channel-wise.

  Attributes:
    image_size: (H, W).
    mean: per channel, in units of `pixel_range`.
    std: per channel, in units of `pixel_range`.
    pixel_range: the value of a white pixel before mean and std: 1 or 255.
    channel_order: 'rgb', 'bgr' or 'grey'; images are always stored RGB.
  """

  image_size: tuple[int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  pixel_range: float = 1.0
  channel_order: str = 'rgb'

  @property
  def shape(self) -> tuple[int, int, int]:
    return (*self.image_size, len(self.mean))

  def _reorder(self, x):
    return x[..., ::-1] if self.channel_order == 'bgr' else x

  def normalize(self, pixels: jax.Array) -> jax.Array:
    """uint8 RGB [..., C] to network input, float32."""
    x = self._reorder(pixels).astype(jnp.float32)
    x = x * (self.pixel_range / 255)
    return (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)

  def to_pixels(self, x: jax.Array) -> jax.Array:
    """The inverse of `normalize`, rounded and clipped to uint8."""
    x = x * jnp.asarray(self.std) + jnp.asarray(self.mean)
    x = jnp.round(x * (255 / self.pixel_range))
    return self._reorder(jnp.clip(x, 0, 255).astype(jnp.uint8))

  @property
  def limit(self) -> float:
    """The largest magnitude that a pixel, black or white, has as input."""
    mean, std = np.asarray(self.mean), np.asarray(self.std)
    white = (self.pixel_range - mean) / std
    return float(np.max(np.abs([-mean / std, white])))
