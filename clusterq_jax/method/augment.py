"""Augmentation of synthetic images: crop and flip, mixup, adversarial step.

Differentiable, batched, and free of data-dependent shapes: the crop is a pair
of bilinear interpolation matrices per image, identities where it is off.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_SCALE = (0.8, 1.0)  # of the image's area
_LOG_ASPECT = 0.2877  # log(4 / 3)


def random_resized_crop_and_flip(
  key: jax.Array, x: jax.Array, probability: float, flip: bool
) -> jax.Array:
  """Augments a whole batch, or leaves the whole batch as it is.

  Args:
    key: PRNG key.
    x: images, [B, H, W, C].
    probability: that this batch is augmented.
    flip: whether mirror images keep their class.

  Returns:
    [B, H, W, C].
  """
  if probability == 0:
    return x
  batch, height, width, _ = x.shape
  keys = jax.random.split(key, 6)
  on = jax.random.bernoulli(keys[0], probability)
  area = jax.random.uniform(
    keys[1], (batch,), minval=_SCALE[0], maxval=_SCALE[1]
  )
  aspect = jnp.exp(
    jax.random.uniform(
      keys[2], (batch,), minval=-_LOG_ASPECT, maxval=_LOG_ASPECT
    )
  )
  fractions = jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)
  matrices = []
  for size, fraction, k in zip(
    (height, width), fractions, keys[3:5], strict=True
  ):
    fraction = jnp.where(on, jnp.minimum(fraction, 1.0), 1.0)
    start = jax.random.uniform(k, (batch,)) * (1 - fraction) * size
    matrices.append(_interpolation(size, start, fraction))
  rows, columns = matrices
  if flip:
    mirrored = on & jax.random.bernoulli(keys[5], 0.5, (batch, 1, 1))
    columns = jnp.where(mirrored, columns[:, ::-1], columns)
  x = jnp.einsum('bih,bhwc->biwc', rows, x)
  return jnp.einsum('bjw,biwc->bijc', columns, x)


def mixup(key: jax.Array, x: jax.Array, probability: float) -> jax.Array:
  """Blends images with others of their batch (Zhang et al. 2018).

  For losses against the teacher's answers to the blended images: no label is
  blended. Not in the paper.

  Args:
    key: PRNG key.
    x: images, [B, H, W, C].
    probability: that an image is blended, in a ratio drawn uniformly.

  Returns:
    [B, H, W, C].
  """
  if probability == 0:
    return x
  on_key, ratio_key = jax.random.split(key)
  shape = (x.shape[0], 1, 1, 1)
  on = jax.random.bernoulli(on_key, probability, shape)
  ratio = jnp.where(on, jax.random.uniform(ratio_key, shape), 0.0)
  return x + ratio * (x[::-1] - x)


def adversarial(
  key: jax.Array,
  x: jax.Array,
  largest: float,
  divergence: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Takes one signed-gradient step (FGSM) that increases a divergence.

  Not in the paper.

  Args:
    key: PRNG key of the step's length, which is uniform per image.
    x: images, [B, H, W, C]; every other one moves.
    largest: maximum step, in normalised pixel units; 0 moves none.
    divergence: images to the scalar that should grow.

  Returns:
    [B, H, W, C].

  References:
    Goodfellow et al., arXiv 1412.6572. Li et al., HAST, arXiv 2303.13826,
    train on hard samples, which they find in another way.
  """
  if largest == 0:
    return x
  direction = jnp.sign(jax.grad(divergence)(x[::2]))
  size = largest * jax.random.uniform(key, (len(direction), 1, 1, 1))
  return x.at[::2].add(size * direction)


def _interpolation(
  size: int, start: jax.Array, fraction: jax.Array
) -> jax.Array:
  """Bilinear resampling of [start, start + fraction * size] to `size` pixels.

  start, fraction: [B]; returns [B, size, size], rows summing to 1.
  """
  grid = jnp.arange(size)
  centre = start[:, None] + (grid + 0.5) * fraction[:, None] - 0.5
  centre = jnp.clip(centre, 0, size - 1)
  return jnp.maximum(0.0, 1 - jnp.abs(centre[..., None] - grid))
