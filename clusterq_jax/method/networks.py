"""Teacher, student and generator as functions of their variables."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from clusterq_jax import sharding
from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.method.generator import Generator
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.models.registry import Builder
from clusterq_jax.ops.moments import Moments
from clusterq_jax.quant.plan import Plan


class Answers(NamedTuple):
  """What a network answers to B images.

  Attributes:
    logits: [B, K].
    features: the output of every convolution with BatchNorm and activation,
      [B, H_l, W_l, C_l], in forward order.
  """

  logits: jax.Array
  features: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Networks:
  """The three networks of a run. Variables come in as arguments.

  Attributes:
    build: makes teacher or student from a layer set.
    graph: their wiring.
    plan: the student's quantizers.
    generator: the generator.
    preprocessing: the teacher's.
    batch_size: B, images per step.
    mesh: the devices.
    dtype: what convolutions compute in, see `conv2d`.
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
    return self.generator.num_classes

  def answers(
    self, network: nn.Module, variables: Any, x: jax.Array, *collections: str
  ) -> tuple[Answers, Any]:
    """Runs a network.

    Features that nobody reads cost nothing: the compiler drops them.

    Args:
      network: from `build`.
      variables: its variables.
      x: normalised images, [B, H, W, C].
      *collections: those that the network may write.

    Returns:
      The answers, and the collections that were written.
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
    """Returns the teacher's answers, and moments of every BatchNorm input."""
    network = self.build(float_layers.layer_set(tap=True, dtype=self.dtype))
    answers, taps = self.answers(network, teacher, x, 'moments')
    return answers, float_layers.ordered_moments(taps, self.graph)

  def teacher_answers(self, teacher: Any, x: jax.Array) -> Answers:
    """Returns the teacher's answers to x; gradients do not flow into them."""
    network = self.build(float_layers.layer_set(dtype=self.dtype))
    return jax.lax.stop_gradient(self.answers(network, teacher, x)[0])

  def teacher_logits(self, teacher: Any, x: jax.Array) -> Any:
    """Returns teacher logits, [B, K]."""
    layers = float_layers.layer_set(dtype=self.dtype)
    return self.build(layers).apply(teacher, x)

  def student_logits(self, student: Any, teacher: Any, x: jax.Array) -> Any:
    """Returns student logits, [B, K]; teacher: for its BatchNorms."""
    network = self.build(fake_quant.layer_set(self.plan, dtype=self.dtype))
    variables = {**student, 'batch_stats': teacher['batch_stats']}
    return network.apply(variables, x)

  def generate(
    self, params: Any, key: jax.Array, labels: jax.Array | None = None
  ) -> tuple[Any, jax.Array]:
    """Generates images.

    Args:
      params: the generator's.
      key: PRNG key.
      labels: classes to show, int [B]; None draws a batch of them.

    Returns:
      Normalised images [B, H, W, C], and the labels.
    """
    z_key, label_key = jax.random.split(key)
    if labels is None:
      labels = jax.random.randint(
        label_key, (self.batch_size,), 0, self.num_classes
      )
    z = jax.random.normal(z_key, (len(labels), self.generator.latent_dim))
    if len(labels) % self.mesh.size == 0:
      z, labels = sharding.split_batch(self.mesh, (z, labels))
    return self.generator.apply({'params': params}, z, labels), labels
