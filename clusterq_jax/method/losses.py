"""The losses of ClusterQ, one function for each equation.

The paper leaves some reductions open. Here, statistics losses are means over
channels and over layers, so the number of layers does not change their scale.
Class terms are then summed over the classes in the batch ('sum', as in eqs. 4
and 6) or averaged over them ('mean').

Class terms take one row for each sample; see `class_statistics.Classes`.

Shapes: B samples, K classes, C_l channels of layer l.

References:
  Gao et al., ClusterQ, arXiv 2205.00179.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clusterq_jax.ops import channels
from clusterq_jax.ops.moments import EPSILON, Statistics


def inception_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Computes the mean cross-entropy (eq. 8, and the first term of eq. 12).

  Args:
    logits: [B, K].
    labels: int [B].

  Returns:
    The loss in nats, [].
  """
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  )


def distillation_loss(
  student_logits: jax.Array, teacher_logits: jax.Array
) -> jax.Array:
  """Computes the mean KL(teacher || student) (eq. 13).

  Eq. 13 writes the student first. Its code has the usual direction, which puts
  the teacher first, and so does this function.

  Args:
    student_logits: [B, K].
    teacher_logits: [B, K].

  Returns:
    The loss in nats, [].
  """
  teacher = jax.nn.log_softmax(teacher_logits)
  student = jax.nn.log_softmax(student_logits)
  return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), -1))


def features_loss(
  student: Sequence[jax.Array], teacher: Sequence[jax.Array]
) -> jax.Array:
  """Computes the squared error of features relative to their mean square.

  This is not in the paper. PLF and other methods found that such a loss helps
  at few bits.

  Args:
    student: features of each layer, [B, H_l, W_l, C_l].
    teacher: features of each layer, [B, H_l, W_l, C_l].

  Returns:
    The mean over layers, [].
  """
  errors = [
    _mean_square(s - t) / (_mean_square(t) + EPSILON)
    for s, t in zip(student, teacher, strict=True)
  ]
  return sum(errors, start=jnp.zeros(())) / len(errors)


def _mean_square(x: jax.Array) -> jax.Array:
  return channels.whole(jnp.square(x)) / x.size


def _distance(a: Statistics, b: Statistics) -> jax.Array:
  """Averages squared distances of mean and std over channels, to [...]."""
  return jnp.mean(
    jnp.square(a.mean - b.mean) + jnp.square(a.std - b.std), axis=-1
  )


def relative(
  statistics: Sequence[Statistics], stored: Sequence[Statistics]
) -> list[Statistics]:
  """Divides statistics by the stored standard deviation of each channel.

  Distances then do not depend on a channel's scale, which BatchNorm removes
  anyway. This is not in the paper.

  Args:
    statistics: statistics of each layer, [..., C_l].
    stored: stored statistics of each layer, [C_l].

  Returns:
    The relative statistics of each layer, [..., C_l].
  """
  return [
    Statistics(mean / unit, std / unit)
    for (mean, std), (_, unit) in zip(statistics, stored, strict=True)
  ]


def statistics_loss(
  batch: Sequence[Statistics], stored: Sequence[Statistics]
) -> jax.Array:
  """Computes the distance of batch from stored BatchNorm statistics (eq. 9).

  Args:
    batch: statistics of the batch in each layer, [C_l].
    stored: stored statistics of each layer, [C_l].

  Returns:
    The mean over layers, [].
  """
  distances = [_distance(a, b) for a, b in zip(batch, stored, strict=True)]
  return sum(distances, start=jnp.zeros(())) / len(distances)


def stored_statistics(
  batch_stats: dict, names: Sequence[str]
) -> tuple[Statistics, ...]:
  """Returns a teacher's stored BatchNorm statistics.

  Args:
    batch_stats: the teacher's collection `batch_stats`.
    names: names of the layers.

  Returns:
    Statistics [C_l] in the order of names.
  """
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
  """Computes semantic feature distribution alignment, SFDA (eq. 4).

  Args:
    classes: statistics of the class of each sample, [B, C_l] for each semantic
      layer.
    expected: statistics that the centroids predict, [B, C_l] for each semantic
      layer; no gradient flows into them.
    share: weight of each sample, [B]. The weights of a class sum to 1 if the
      class counts, else they are 0.
    reduction: reduction over classes, 'sum' or 'mean'.

  Returns:
    The loss, []; 0 without gradient if no class counts.
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
  """Computes the distance to centroids with added noise (eq. 6).

  The noise increases the variance within classes.

  Args:
    key: PRNG key; a new one for each step.
    classes: see `sfda_loss`.
    expected: see `sfda_loss`.
    share: see `sfda_loss`.
    first: index of one sample of each sample's class, int [B]. All samples of
      the class get its noise.
    noise: (lambda_mu, lambda_sigma), the standard deviations of the noise on
      means and on standard deviations. Noisy deviations are clipped at 0.
    reduction: see `sfda_loss`.

  Returns:
    The loss, [].
  """
  # One draw for all layers compiles faster than one draw for each layer.
  channels = [mean.shape[-1] for mean, _ in expected]
  draws = jax.random.normal(key, (2, len(first), sum(channels)))
  layers = jnp.split(draws[:, first], np.cumsum(channels)[:-1], axis=-1)
  noisy = []
  for i, (mean, std) in enumerate(expected):
    mean += noise[0] * layers[i][0]
    std += noise[1] * layers[i][1]
    noisy.append(Statistics(mean, jnp.maximum(std, 0.0)))
  return sfda_loss(classes, noisy, share, reduction)
