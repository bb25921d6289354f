"""Objectives of the generator (L1, L2), the student (L3) and procedural images.

References:
  Gao et al., ClusterQ, arXiv 2205.00179, eqs. 7, 10 and 11.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clusterq_jax.config.fields import Config, Loss
from clusterq_jax.method import centroids as centroids_lib
from clusterq_jax.method import losses
from clusterq_jax.method.class_statistics import class_statistics, classes_of
from clusterq_jax.method.networks import Answers
from clusterq_jax.ops.moments import Moments, Statistics, batch_statistics

Metrics = dict[str, jax.Array]


class Generated(NamedTuple):
  """A batch of generator images with the teacher's answers.

  Attributes:
    images: images before augmentation, [B, H, W, C].
    x: images that the teacher saw, augmented or not, [B, H, W, C].
    labels: labels that the generator was given, int [B].
    answers: the teacher's answers to x.
    moments: moments of the teacher's BatchNorm inputs, [B, C_l] in each layer.
  """

  images: jax.Array
  x: jax.Array
  labels: jax.Array
  answers: Answers
  moments: tuple[Moments, ...]


def _comparable(
  weights: Loss, found: Sequence[Statistics], stored: Sequence[Statistics]
) -> Sequence[Statistics]:
  """Converts statistics of the last len(found) layers to the loss's units."""
  if not weights.relative:
    return found
  return losses.relative(found, stored[-len(found) :])


def l1(weights: Loss, seen: Generated, stored: Sequence[Statistics]) -> Metrics:
  """Computes the terms of L1 (eq. 7).

  Args:
    weights: weights of the terms.
    seen: a batch of generator images.
    stored: the teacher's BatchNorm statistics, [C_l] in each layer.

  Returns:
    The terms, and their weighted sum as 'loss', [] each.
  """
  logits = seen.answers.logits
  batch = [batch_statistics(m) for m in seen.moments]
  statistics = losses.statistics_loss(
    _comparable(weights, batch, stored), _comparable(weights, stored, stored)
  )
  inception = losses.inception_loss(logits, seen.labels)
  return {
    'inception': inception,
    'statistics': statistics,
    'accuracy': jnp.mean(jnp.argmax(logits, -1) == seen.labels),
    'loss': inception + weights.statistics * statistics,
  }


def l2(
  config: Config,
  seen: Generated,
  stored: Sequence[Statistics],
  centroids: centroids_lib.Centroids,
  first_semantic_layer: int,
  noise_key: jax.Array,
  after_warmup: jax.Array | bool = True,
) -> tuple[Metrics, centroids_lib.Centroids]:
  """Computes the terms of L2 (eq. 10) and moves the centroids (eq. 5).

  Args:
    config: configuration with the weights and the decay of centroids.
    seen: a batch of generator images.
    stored: the teacher's BatchNorm statistics, [C_l] in each layer.
    centroids: centroids of the semantic layers.
    first_semantic_layer: index of the first semantic layer.
    noise_key: PRNG key of the diversity term.
    after_warmup: whether the class terms count and the centroids move, bool [].
      Otherwise the loss is L1 (eq. 7).

  Returns:
    A pair. First, the terms, and their weighted sum as 'loss', [] each. Second,
    the new centroids.
  """
  weights = config.loss
  # L1 comes first: the order of the terms is the order in which JAX adds their
  # gradients, and another order would change the last bits.
  terms = l1(weights, seen, stored)
  classes = classes_of(seen.labels, seen.answers.logits)
  # A class without a share has no loss, no gradient and no update.
  share = jnp.where(after_warmup, classes.share, 0.0)
  classes = classes._replace(share=share)
  semantic = seen.moments[first_semantic_layer:]
  of_batch = [class_statistics(m, classes) for m in semantic]
  of_centroids, share = centroids_lib.expected(centroids, classes)
  found = _comparable(weights, of_batch, stored)
  expected = _comparable(weights, of_centroids, stored)
  reduction = weights.class_reduction
  sfda = losses.sfda_loss(found, expected, share, reduction)
  diversity = losses.diversity_loss(
    noise_key, found, expected, share, classes.first, weights.noise, reduction
  )
  terms |= {
    'sfda': sfda,
    'diversity': diversity,
    'loss': terms['loss']
    + (weights.sfda * sfda + weights.diversity * diversity),
  }
  decay = config.centroids.decay
  return terms, centroids_lib.update(centroids, semantic, classes, decay)


def l3(
  weights: Loss, student: Answers, teacher: Answers, labels: jax.Array
) -> Metrics:
  """Computes the terms of L3 (eq. 11).

  The weight of the divergence, gamma in the paper, is 1.

  Args:
    weights: weights of the terms.
    student: the student's answers to B images.
    teacher: the teacher's answers to the same images.
    labels: int [B].

  Returns:
    The terms, and their weighted sum as 'loss', [] each.
  """
  entropy = losses.inception_loss(student.logits, labels)
  divergence = losses.distillation_loss(student.logits, teacher.logits)
  agree = jnp.argmax(student.logits, -1) == jnp.argmax(teacher.logits, -1)
  loss = weights.student_cross_entropy * entropy + divergence
  terms = {
    'cross_entropy': entropy,
    'distillation': divergence,
    'agreement': jnp.mean(agree),
  }
  if weights.features:
    features = losses.features_loss(student.features, teacher.features)
    terms['features'] = features
    loss += weights.features * features
  return terms | {'loss': loss}


def procedural(
  moments: Sequence[Moments], stored: Sequence[Statistics]
) -> jax.Array:
  """Computes eq. 9 for procedural images, in units of stored deviations.

  Args:
    moments: moments of the teacher's BatchNorm inputs, [B, C_l] in each layer.
    stored: the teacher's BatchNorm statistics, [C_l] in each layer.

  Returns:
    The loss, [].
  """
  found = [batch_statistics(m) for m in moments]
  return losses.statistics_loss(
    losses.relative(found, stored), losses.relative(stored, stored)
  )
