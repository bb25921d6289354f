"""Teacher, student and generator as functions of their variables."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from clusterq_jax import sharding
from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.method import losses
from clusterq_jax.method.generator import Generator
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.models.registry import Builder
from clusterq_jax.ops.moments import Moments
from clusterq_jax.quant.plan import Plan


class Answers(NamedTuple):
  """The outputs of a network for B images.

  Attributes:
    logits: [B, K].
    features: output of each layer with BatchNorm, after its activation,
      [B, H_l, W_l, C_l] in forward order.
  """

  logits: jax.Array
  features: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Networks:
  """The three networks of a run; their variables are arguments.

  Attributes:
    build: makes teacher or student from a layer set.
    graph: wiring of teacher and student.
    plan: quantizers of the student.
    generator: the generator.
    preprocessing: input format of the teacher.
    batch_size: number B of images in a step.
    mesh: devices that share a batch.
    dtype: dtype of convolutions; see `convolution.conv2d`.
  """

  build: Builder
  graph: Graph
  plan: Plan
  generator: Generator
  preprocessing: Preprocessing
  batch_size: int
  mesh: jax.sharding.Mesh
  dtype: Any = None

  @property
  def num_classes(self) -> int:
    """Returns the number K of classes."""
    return self.generator.num_classes

  def answers(
    self, network: nn.Module, variables: Any, x: jax.Array, *collections: str
  ) -> tuple[Answers, Any]:
    """Runs a network.

    Unused features cost nothing, because the compiler removes them.

    Args:
      network: a network from `build`.
      variables: variables of the network.
      x: normalised images, [B, H, W, C].
      *collections: collections that the network may write.

    Returns:
      The answers and the written collections.
    """
    names = self.graph.batch_norms
    logits, written = network.apply(
      variables,
      x,
      capture_intermediates=lambda module, method: (
        method == '__call__' and module.name in names
      ),
      mutable=['intermediates', *collections],
    )
    outputs = written['intermediates']
    features = tuple(outputs[name]['__call__'][0] for name in names)
    return Answers(logits, features), written

  def teach(
    self, teacher: Any, x: jax.Array
  ) -> tuple[Answers, tuple[Moments, ...]]:
    """Runs the teacher and records the moments of BatchNorm inputs.

    Args:
      teacher: variables of the teacher.
      x: normalised images, [B, H, W, C].

    Returns:
      The answers and the moments of each layer, [B, C_l] in forward order.
    """
    network = self.build(float_layers.layer_set(tap=True, dtype=self.dtype))
    answers, taps = self.answers(network, teacher, x, 'moments')
    return answers, float_layers.ordered_moments(taps, self.graph)

  def teacher_answers(self, teacher: Any, x: jax.Array) -> Answers:
    """Returns the teacher's answers to x; no gradient flows into them."""
    network = self.build(float_layers.layer_set(dtype=self.dtype))
    return jax.lax.stop_gradient(self.answers(network, teacher, x)[0])

  def teacher_logits(self, teacher: Any, x: jax.Array) -> Any:
    """Returns the teacher's logits for images x, [B, K]."""
    layers = float_layers.layer_set(dtype=self.dtype)
    return self.build(layers).apply(teacher, x)

  def student_logits(self, student: Any, teacher: Any, x: jax.Array) -> Any:
    """Returns the student's logits for images x, [B, K].

    Args:
      student: {'params', 'quant'}.
      teacher: variables of the teacher, which hold the BatchNorm statistics.
      x: normalised images, [B, H, W, C].
    """
    network = self.build(fake_quant.layer_set(self.plan, dtype=self.dtype))
    variables = {**student, 'batch_stats': teacher['batch_stats']}
    return network.apply(variables, x)

  def divergence(self, student: Any, teacher: Any, x: jax.Array) -> jax.Array:
    """Returns the mean KL(teacher || student) for images x, [].

    Args:
      student: {'params', 'quant'}.
      teacher: variables of the teacher.
      x: normalised images, [B, H, W, C].
    """
    return losses.distillation_loss(
      self.student_logits(student, teacher, x), self.teacher_logits(teacher, x)
    )

  def generate(
    self, params: Any, key: jax.Array, labels: jax.Array | None = None
  ) -> tuple[Any, jax.Array]:
    """Generates images.

    Args:
      params: parameters of the generator.
      key: PRNG key.
      labels: classes to show, int [B]; None draws B uniform labels.

    Returns:
      Normalised images [B, H, W, C] and their labels, int [B].
    """
    z_key, label_key = jax.random.split(key)
    if labels is None:
      labels = jax.random.randint(
        label_key, (self.batch_size,), 0, self.num_classes
      )
    z = jax.random.normal(z_key, (len(labels), self.generator.latent_dim))
    # Batches that the devices cannot share evenly stay replicated.
    if len(labels) % self.mesh.size == 0:
      z, labels = sharding.split_batch(self.mesh, (z, labels))
    return self.generator.apply({'params': params}, z, labels), labels
