"""The pool: the images that the student learns from, as uint8 pixels.

Its rows are P batches of the generator's newest images, then M batches of
procedural images, [(P + M) * B, H, W, C].
"""

import dataclasses

import jax
import jax.numpy as jnp

from clusterq_jax.models.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class PoolLayout:
  """Where which images of the pool are.

  Attributes:
    generated: P, batches of the generator's images.
    procedural: M, batches of procedural images.
    batch_size: B.
    preprocessing: the teacher's.
  """

  generated: int
  procedural: int
  batch_size: int
  preprocessing: Preprocessing

  def empty(self) -> jax.Array | None:
    """Returns a black pool; None where it holds nothing."""
    images = (self.generated + self.procedural) * self.batch_size
    if not images:
      return None
    return jnp.zeros((images, *self.preprocessing.shape), jnp.uint8)

  def remember(
    self, pool: jax.Array | None, images: jax.Array, step: jax.Array
  ) -> jax.Array | None:
    """Puts a batch of generator images in place of the oldest one.

    Args:
      pool: the pool; None stays None.
      images: normalised, [B, H, W, C].
      step: number of steps before this one, [].
    """
    if pool is None or not self.generated:
      return pool
    start = (step % self.generated) * self.batch_size
    pixels = self.preprocessing.to_pixels(images)
    return jax.lax.dynamic_update_slice_in_dim(pool, pixels, start, 0)

  def procedural_start(self, batch: jax.Array) -> jax.Array:
    """Returns the first row of a procedural batch, counted from 0."""
    return (self.generated + batch) * self.batch_size

  def first_procedural(self, pool: jax.Array, batches: int) -> jax.Array:
    """Returns the first procedural images, at most so many batches."""
    first = self.generated * self.batch_size
    count = min(self.procedural, batches) * self.batch_size
    return self.preprocessing.normalize(pool[first : first + count])
