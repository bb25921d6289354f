"""Augmentation of synthetic images: crop and flip, mixup, adversarial step.

All functions are batched and have static shapes. The crop is differentiable: it
multiplies each image with two bilinear interpolation matrices. Without a crop,
the matrices are identities.
"""

import jax
import jax.numpy as jnp

_SCALE = (0.8, 1.0)  # area of a crop, as a fraction of the image's area
_LOG_ASPECT = 0.2877  # log(4 / 3), the largest log of a crop's aspect ratio


def random_resized_crop_and_flip(
  key: jax.Array, x: jax.Array, probability: float, flip: bool
) -> jax.Array:
  """Crops and flips all images of a batch, or none of them.

  Args:
    key: PRNG key.
    x: images, [B, H, W, C].
    probability: probability that the batch is augmented.
    flip: whether augmentation mirrors half of the images.

  Returns:
    The augmented images, [B, H, W, C].
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
  """Blends images with other images of their batch.

  Labels are not blended, because the teacher labels the blended images. This is
  not in the paper.

  Args:
    key: PRNG key.
    x: images, [B, H, W, C].
    probability: probability that an image is blended. The ratio is uniform.

  Returns:
    The blended images, [B, H, W, C].

  References:
    Zhang et al., mixup, arXiv 1710.09412.
  """
  if probability == 0:
    return x
  on_key, ratio_key = jax.random.split(key)
  shape = (x.shape[0], 1, 1, 1)
  on = jax.random.bernoulli(on_key, probability, shape)
  ratio = jnp.where(on, jax.random.uniform(ratio_key, shape), 0.0)
  return x + ratio * (x[::-1] - x)


def adversarial(
  key: jax.Array, x: jax.Array, gradient: jax.Array, largest: float
) -> jax.Array:
  """Takes one signed-gradient step (FGSM) that increases a loss.

  This is not in the paper.

  Args:
    key: PRNG key of the step lengths, which are uniform for each image.
    x: images, [B, H, W, C].
    gradient: d loss / d x, [B, H, W, C].
    largest: maximum step, in normalised pixel units.

  Returns:
    The images after the step, [B, H, W, C].

  References:
    Goodfellow et al., arXiv 1412.6572. Li et al., HAST, arXiv 2303.13826, also
    train on hard samples, but find them by other means.
  """
  size = largest * jax.random.uniform(key, (len(x), 1, 1, 1))
  return x + size * jnp.sign(gradient)


def _interpolation(
  size: int, start: jax.Array, fraction: jax.Array
) -> jax.Array:
  """Makes matrices that resample [start, start + fraction * size] bilinearly.

  Args:
    size: number of pixels before and after.
    start: begin of the crop in pixels, [B].
    fraction: length of the crop as a fraction of `size`, [B].

  Returns:
    [B, size, size]; the sum of each row is 1.
  """
  grid = jnp.arange(size)
  centre = start[:, None] + (grid + 0.5) * fraction[:, None] - 0.5
  centre = jnp.clip(centre, 0, size - 1)
  return jnp.maximum(0.0, 1 - jnp.abs(centre[..., None] - grid))
