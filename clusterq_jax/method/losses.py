"""The losses of ClusterQ, one function per equation.

Source: Gao et al., arXiv 2205.00179. Reductions, where the paper leaves them
open: statistics losses are means over channels and over layers, so that L equal
layers cost what one does; the class terms are then summed over the classes
present, as eqs. 4 and 6 have it ('sum'), or averaged over them ('mean').

Class terms take one row per sample, not per class (`statistics.Classes`).

Shapes: B batch, K classes, C_l channels of layer l.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clusterq_jax.ops.moments import EPSILON, Statistics


def inception_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean cross-entropy (eq. 8, and the first term of eq. 12).

  Args:
    logits: [B, K].
    labels: int [B].
  """
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  )


def distillation_loss(
  student_logits: jax.Array, teacher_logits: jax.Array
) -> jax.Array:
  """Mean KL(teacher || student) (eq. 13, in the direction the code base uses).

  Args:
    student_logits: [B, K].
    teacher_logits: [B, K].
  """
  teacher = jax.nn.log_softmax(teacher_logits)
  student = jax.nn.log_softmax(student_logits)
  return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), -1))


def features_loss(
  student: Sequence[jax.Array], teacher: Sequence[jax.Array]
) -> jax.Array:
  """Squared error of the student's features, relative to their mean square.

  A mean over layers. Not in the paper: from PLF and others, which find that it
  pays at few bits.

  Args:
    student: [B, H_l, W_l, C_l] per layer.
    teacher: the same shapes.
  """
  errors = [
    jnp.mean(jnp.square(s - t)) / (jnp.mean(jnp.square(t)) + EPSILON)
    for s, t in zip(student, teacher, strict=True)
  ]
  return sum(errors, start=jnp.zeros(())) / len(errors)


def _distance(a: Statistics, b: Statistics) -> jax.Array:
  """Squared distances of mean and std, averaged over channels: [...]."""
  return jnp.mean(
    jnp.square(a.mean - b.mean) + jnp.square(a.std - b.std), axis=-1
  )


def relative(
  statistics: Sequence[Statistics], stored: Sequence[Statistics]
) -> list[Statistics]:
  """Statistics in units of the stored standard deviation of each channel.

  Their distances weigh channels and layers alike, whatever the scale that a
  BatchNorm undoes. Not in the paper.

  Args:
    statistics: [..., C_l] per layer.
    stored: [C_l] per layer.
  """
  return [
    Statistics(mean / unit, std / unit)
    for (mean, std), (_, unit) in zip(statistics, stored, strict=True)
  ]


def statistics_loss(
  batch: Sequence[Statistics], stored: Sequence[Statistics]
) -> jax.Array:
  """Distance of batch from stored BatchNorm statistics (eq. 9).

  Args:
    batch: [C_l] per layer.
    stored: [C_l] per layer.
  """
  distances = [_distance(a, b) for a, b in zip(batch, stored, strict=True)]
  return sum(distances, start=jnp.zeros(())) / len(distances)


def stored_statistics(
  batch_stats: dict, names: Sequence[str]
) -> tuple[Statistics, ...]:
  """A teacher's stored BatchNorm statistics, [C_l] per named layer."""
  return tuple(
    Statistics(
      batch_stats[n]['mean'], jnp.sqrt(batch_stats[n]['var'] + EPSILON)
    )
    for n in names
  )


def sfda_loss(
  classes: Sequence[Statistics],
  expected: Sequence[Statistics],
  share: jax.Array,
  reduction: str = 'sum',
) -> jax.Array:
  """Semantic feature distribution alignment (eq. 4).

  Args:
    classes: statistics of every sample's class in the batch, [B, C_l] per
      semantic layer.
    expected: what the centroids expect of them, [B, C_l] per semantic layer; no
      gradient flows into it.
    share: of each sample in its class, adding up to 1 over the samples of a
      class that counts, and 0 elsewhere, [B].
    reduction: over classes, 'sum' or 'mean'.

  Returns:
    A scalar; 0 without gradient when no class counts.
  """
  expected = jax.lax.stop_gradient(expected)
  distances = [_distance(a, b) for a, b in zip(classes, expected, strict=True)]
  layers = [jnp.sum(jnp.where(share > 0, share * d, 0.0)) for d in distances]
  total = jnp.mean(jnp.stack(layers))
  if reduction == 'mean':
    total = total / jnp.maximum(jnp.sum(share), 1)
  return total


def diversity_loss(
  key: jax.Array,
  classes: Sequence[Statistics],
  expected: Sequence[Statistics],
  share: jax.Array,
  first: jax.Array,
  noise: tuple[float, ...],
  reduction: str = 'sum',
) -> jax.Array:
  """Intra-class variance: alignment with centroids under noise (eq. 6).

  Args:
    key: fresh at every step.
    classes: as in `sfda_loss`.
    expected: as in `sfda_loss`.
    share: as in `sfda_loss`.
    first: index of a sample of each sample's class, int [B]: whose noise all
      samples of the class share.
    noise: (lambda_mu, lambda_sigma), standard deviations of the noise on means
      and on standard deviations; the latter are clipped at 0 after it.
    reduction: as in `sfda_loss`.
  """
  # One draw for all layers compiles faster than one for each.
  channels = [mean.shape[-1] for mean, _ in expected]
  draws = jax.random.normal(key, (2, len(first), sum(channels)))
  layers = jnp.split(draws[:, first], np.cumsum(channels)[:-1], axis=-1)
  noisy = []
  for i, (mean, std) in enumerate(expected):
    mean += noise[0] * layers[i][0]
    std += noise[1] * layers[i][1]
    noisy.append(Statistics(mean, jnp.maximum(std, 0.0)))
  return sfda_loss(classes, noisy, share, reduction)
