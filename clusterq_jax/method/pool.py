"""The pool of images from which the student learns.

The pool is an array of uint8 pixels, [(P + M) * B, H, W, C]. It holds P batches
of the newest generator images, then M batches of procedural images.
"""

import dataclasses

import jax
import jax.numpy as jnp

from clusterq_jax.models.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class PoolLayout:
  """The layout of the pool.

  Attributes:
    generated: number P of batches of generator images.
    procedural: number M of batches of procedural images.
    batch_size: number B of images in a batch.
    preprocessing: input format of the teacher.
  """

  generated: int
  procedural: int
  batch_size: int
  preprocessing: Preprocessing

  def empty(self) -> jax.Array | None:
    """Returns a pool of black images, or None if P = M = 0."""
    images = (self.generated + self.procedural) * self.batch_size
    if not images:
      return None
    return jnp.zeros((images, *self.preprocessing.shape), jnp.uint8)

  def remember(
    self, pool: jax.Array | None, images: jax.Array, step: jax.Array
  ) -> jax.Array | None:
    """Replaces the oldest batch of generator images.

    Args:
      pool: the pool, or None.
      images: normalised images, [B, H, W, C].
      step: number of steps before this one, int [].

    Returns:
      The new pool, or None for None.
    """
    if pool is None or not self.generated:
      return pool
    start = (step % self.generated) * self.batch_size
    pixels = self.preprocessing.to_pixels(images)
    return jax.lax.dynamic_update_slice_in_dim(pool, pixels, start, 0)

  def procedural_start(self, batch: jax.Array) -> jax.Array:
    """Returns the first row of the procedural batch with a given index."""
    return (self.generated + batch) * self.batch_size

  def first_procedural(self, pool: jax.Array, batches: int) -> jax.Array:
    """Returns the first procedural images.

    Args:
      pool: the pool.
      batches: maximum number of batches to return.

    Returns:
      Normalised images, [min(M, batches) * B, H, W, C].
    """
    first = self.generated * self.batch_size
    count = min(self.procedural, batches) * self.batch_size
    return self.preprocessing.normalize(pool[first : first + count])
