"""The steps of the method, as pure functions of the train state.

    generator_step   L1 in the warm-up (eq. 7), L2 after it (eq. 10)
    joint_step       L2 for the generator and L3 for the student (eq. 11) on the
                     same images; the teacher runs once
    procedural_step  procedural images, by their pixels
    student_step     L3 on images of the pool, the generator at rest
    evaluate_step    counts of right and of agreeing answers

and the two transitions between phases: `initialize_centroids` and
`calibrate_student`. All of them are methods of `Steps`, which holds what is
static; arrays come in as arguments. Source: Gao et al., arXiv 2205.00179; the
student-only phase is this project's (a generator rests while the student learns
from its recent images, as IntraQ and HAST do with fixed sets).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from clusterq_jax import sharding
from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.method import augment, losses, procedural
from clusterq_jax.method import centroids as centroids_lib
from clusterq_jax.method.class_statistics import class_statistics, classes_of
from clusterq_jax.method.generator import Generator
from clusterq_jax.method.state import TrainState
from clusterq_jax.models.graph import Graph
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.models.registry import Builder
from clusterq_jax.ops.moments import batch_statistics
from clusterq_jax.quant.plan import Plan

Metrics = dict[str, jax.Array]
LearningRate = Callable[[jax.Array], jax.Array]
_RANGE_DECAY = 0.9  # EMA of activation ranges, per student step
_CALIBRATION_BATCHES = 4
_PIXEL_STEP = 0.03  # of normalised input


class Answers(NamedTuple):
  """What a network says of B images.

  Attributes:
    logits: [B, K].
    features: the output of every convolution with BatchNorm and activation,
      [B, H_l, W_l, C_l], in forward order.
  """

  logits: jax.Array
  features: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class LossWeights:
  """Weights and choices of the losses; symbols as in the paper."""

  statistics: float  # a1
  sfda: float  # a2
  diversity: float  # a3
  noise: tuple[float, float]  # lambda_mu, lambda_sigma
  relative: str  # what is, to the stored std of each channel
  class_reduction: str
  centroid_decay: float  # beta
  student_cross_entropy: float
  distillation: float  # gamma
  features: float


@dataclasses.dataclass(frozen=True)
class Steps:
  """What the steps need to know; see the module docstring for the steps.

  Attributes:
    build: makes the network from a layer set.
    graph: its wiring.
    plan: the student's quantizers.
    generator: the generator.
    preprocessing: the teacher's.
    weights: of the losses.
    first_semantic_layer: index of the first BatchNorm with class terms.
    batch_size: B, images per step.
    pool_batches: P, batches of the generator that the pool holds.
    procedural_batches: M, procedural ones that it holds after them.
    procedural_start: the first step that makes these.
    augment_probability: of augmenting a batch.
    augment_flip: whether augmentation mirrors.
    augment_mixup: of blending an image with another, in student steps.
    augment_adversarial: how far, of a normalised pixel, every other image is
      moved at most to where student and teacher differ more, in student steps.
    range_steps: step up to which activation ranges adapt (minmax ranges).
    generator_lr, student_lr, quant_lr: learning rates by step.
    generator_optimizer, student_optimizer: without learning rate.
    mesh: devices.
    dtype: what convolutions compute in, the generator's too; see `conv2d`.
  """

  build: Builder
  graph: Graph
  plan: Plan
  generator: Generator
  preprocessing: Preprocessing
  weights: LossWeights
  first_semantic_layer: int
  batch_size: int
  pool_batches: int
  procedural_batches: int
  procedural_start: int
  augment_probability: float
  augment_flip: bool
  augment_mixup: float
  augment_adversarial: float
  range_steps: int
  generator_lr: LearningRate
  student_lr: LearningRate
  quant_lr: LearningRate
  generator_optimizer: optax.GradientTransformation
  student_optimizer: optax.GradientTransformation
  mesh: jax.sharding.Mesh
  dtype: Any = None

  # ------------------------------------------------------------- networks

  @property
  def num_classes(self) -> int:
    return self.generator.num_classes

  @property
  def of_phase(self) -> dict[str, Callable]:
    """The step of each of `config.phases`."""
    return {
      'warm-up': self.warmup_step,
      'generator': self.generator_step,
      'procedural': self.procedural_step,
      'joint': self.joint_step,
      'student': self.student_step,
    }

  @property
  def _semantic(self) -> slice:
    return slice(self.first_semantic_layer, None)

  def _network(self, layers) -> nn.Module:
    return self.build(layers)

  def _answers(
    self, network: nn.Module, variables: Any, x: jax.Array, *collections: str
  ) -> tuple[Answers, Any]:
    """Answers, and the collections that the network wrote.

    Features that nobody reads cost nothing: the compiler drops them.
    """
    names = self.graph.batch_norms
    logits, written = network.apply(
      variables,
      x,
      capture_intermediates=lambda module, _: module.name in names,
      mutable=['intermediates', *collections],
    )
    outputs = written['intermediates']
    features = tuple(outputs[name]['__call__'][0] for name in names)
    return Answers(logits, features), written

  def teach(self, teacher: Any, x: jax.Array):
    """The teacher's answers, and moments of every BatchNorm input."""
    network = self._network(float_layers.layer_set(tap=True, dtype=self.dtype))
    answers, taps = self._answers(network, teacher, x, 'moments')
    return answers, float_layers.ordered_moments(taps, self.graph)

  def teacher_logits(self, teacher: Any, x: jax.Array):
    """Teacher logits [B, K]."""
    layers = float_layers.layer_set(dtype=self.dtype)
    return self._network(layers).apply(teacher, x)

  def student_logits(self, student: Any, teacher: Any, x: jax.Array):
    """Student logits [B, K]; BatchNorm statistics are the teacher's."""
    network = self._network(fake_quant.layer_set(self.plan, dtype=self.dtype))
    variables = {**student, 'batch_stats': teacher['batch_stats']}
    return network.apply(variables, x)

  def generate(
    self, params: Any, key: jax.Array, labels: jax.Array | None = None
  ):
    """Images [B, H, W, C], and the labels they were asked to show, int [B].

    Labels are drawn, a whole batch of them, unless given.
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

  def _augment(self, key: jax.Array, x: jax.Array) -> jax.Array:
    return augment.random_resized_crop_and_flip(
      key, x, self.augment_probability, self.augment_flip
    )

  def _harden(self, key: jax.Array, state, teacher, x: jax.Array) -> jax.Array:
    """Moves every other image to where student and teacher differ more.

    Along the sign of the gradient of their divergence, as far as drawn. Not in
    the paper: as the harder samples of HAST (Li et al., CVPR 2023, arXiv
    2303.13826), which measures difficulty in another way.
    """
    if self.augment_adversarial == 0:
      return x

    def divergence(x):
      student = self.student_logits(state.student, teacher, x)
      return losses.distillation_loss(student, self.teacher_logits(teacher, x))

    direction = jnp.sign(jax.grad(divergence)(x[::2]))
    size = self.augment_adversarial * jax.random.uniform(
      key, (len(direction), 1, 1, 1)
    )
    return x.at[::2].add(size * direction)

  # ------------------------------------------------------------ the state

  def init(self, key: jax.Array, teacher: Any) -> TrainState:
    """The state before the first step; the student starts as the teacher."""
    z = jnp.zeros((1, self.generator.latent_dim))
    labels = jnp.zeros((1,), int)
    generator = self.generator.init(key, z, labels)['params']
    shapes = jax.eval_shape(
      self._calibrate,
      teacher,
      jax.ShapeDtypeStruct(
        (self.batch_size, *self.generator.shape), jnp.zeros(()).dtype
      ),
    )
    student = {
      'params': jax.tree.map(jnp.asarray, teacher['params']),
      'quant': jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), shapes['quant']
      ),
    }
    names = self.graph.batch_norms[self._semantic]
    channels = [teacher['batch_stats'][name]['mean'].shape[0] for name in names]
    pool = None
    images = (self.pool_batches + self.procedural_batches) * self.batch_size
    if images:
      pool = jnp.zeros((images, *self.generator.shape), jnp.uint8)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      generator=generator,
      generator_opt=self.generator_optimizer.init(generator),
      student=student,
      student_opt=self.student_optimizer.init(self._trained(student)),
      centroids=centroids_lib.empty(self.num_classes, tuple(channels)),
      pool=pool,
      bad_step=jnp.full((), -1, jnp.int32),
    )

  def abstract_state(self, key: jax.Array, teacher: Any) -> TrainState:
    """Shapes, dtypes and places of `init(key, teacher)`, for `Checkpoints`."""
    everywhere = sharding.replicated(self.mesh)
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere),
      jax.eval_shape(self.init, key, teacher),
    )

  def _trained(self, student: Any) -> Any:
    """The part of the student that its optimiser moves."""
    return student if self.plan.learned else {'params': student['params']}

  # ---------------------------------------------------------- transitions

  def initialize_centroids(
    self, state: TrainState, teacher: Any, keys: jax.Array
  ) -> TrainState:
    """Mean class moments of len(keys) batches of the warmed-up generator."""

    def add_batch(carry, key):
      centroids, count = carry
      x, labels = self.generate(state.generator, key)
      answers, moments = self.teach(teacher, x)
      classes = classes_of(labels, answers.logits)
      count = count.at[labels].add(classes.share > 0)
      # So weighted, the moving average is the mean over all images so far.
      beta = classes.size / jnp.maximum(count[labels], 1)
      centroids = centroids_lib.update(
        centroids, moments[self._semantic], classes, beta
      )
      return (centroids, count), None

    count = jnp.zeros((self.num_classes,), jnp.int32)
    (centroids, _), _ = jax.lax.scan(add_batch, (state.centroids, count), keys)
    return state.replace(centroids=centroids)

  def _calibrate(self, teacher: Any, x: jax.Array) -> Any:
    """A student of the teacher's params, made for images x."""
    layers = fake_quant.layer_set(self.plan, calibrate=True, dtype=self.dtype)
    variables = dict(teacher)
    if self.plan.learned:
      _, moments = self.teach(teacher, x)
      found = [batch_statistics(m) for m in moments]
      variables['targets'] = {
        name: {'input': target}
        for name, target in zip(self.graph.batch_norms, found, strict=True)
      }
    _, student = self._network(layers).apply(
      variables, x, mutable=['params', 'quant']
    )
    return dict(student)

  def _calibration_images(self, state: TrainState, key: jax.Array) -> jax.Array:
    """The first procedural images, or a batch of the generator's."""
    if not self.procedural_batches:
      return self.generate(state.generator, key)[0]
    assert state.pool is not None
    first = self.pool_batches * self.batch_size
    count = min(self.procedural_batches, _CALIBRATION_BATCHES) * self.batch_size
    return self.preprocessing.normalize(state.pool[first : first + count])

  def calibrate_student(
    self, state: TrainState, teacher: Any, key: jax.Array
  ) -> TrainState:
    """Sets every quantizer from synthetic images.

    With learned ranges, the weights too, such that layers keep their outputs on
    these images, and the BatchNorms, such that their inputs keep the statistics
    that they have in the teacher.
    """
    images = self._calibration_images(state, key)
    return state.replace(student=self._calibrate(teacher, images))

  # ---------------------------------------------------------------- steps

  def _generator_update(
    self, state, teacher, key, class_terms, augmented=False
  ):
    """One generator update; also what the student can use of it."""
    image_key, augment_key, noise_key = jax.random.split(key, 3)
    names = self.graph.batch_norms
    stored = losses.stored_statistics(teacher['batch_stats'], names)
    w = self.weights

    def comparable(found):
      """Statistics of the last len(found) layers, [..., C_l], for a loss."""
      if w.relative != 'all':
        return found
      return losses.relative(found, stored[-len(found) :])

    def loss_fn(params):
      images, labels = self.generate(params, image_key)
      x = self._augment(augment_key, images) if augmented else images
      answers, moments = self.teach(teacher, x)
      logits = answers.logits
      batch = comparable([batch_statistics(m) for m in moments])
      terms = {
        'inception': losses.inception_loss(logits, labels),
        'statistics': losses.statistics_loss(batch, comparable(stored)),
      }
      loss = terms['inception'] + w.statistics * terms['statistics']
      centroids = state.centroids
      if class_terms:
        classes = classes_of(labels, logits)
        semantic = moments[self._semantic]
        found = comparable([class_statistics(m, classes) for m in semantic])
        expected, share = centroids_lib.expected(centroids, classes)
        expected = comparable(expected)
        relative = stored[self._semantic] if w.relative == 'noise' else None
        terms['sfda'] = losses.sfda_loss(
          found, expected, share, w.class_reduction
        )
        terms['diversity'] = losses.diversity_loss(
          noise_key,
          found,
          expected,
          share,
          classes.first,
          w.noise,
          relative,
          w.class_reduction,
        )
        loss += w.sfda * terms['sfda'] + w.diversity * terms['diversity']
        centroids = centroids_lib.update(
          centroids, semantic, classes, w.centroid_decay
        )
      terms['accuracy'] = jnp.mean(jnp.argmax(logits, -1) == labels)
      terms['loss'] = loss
      return loss, (terms, centroids, images, x, labels, answers)

    grads, (terms, centroids, *images) = jax.grad(loss_fn, has_aux=True)(
      state.generator
    )
    updates, opt = self.generator_optimizer.update(
      grads, state.generator_opt, state.generator
    )
    new = _apply(state.generator, updates, self.generator_lr(state.step))
    metrics = {f'generator/{k}': v for k, v in terms.items()}
    state = state.replace(generator=new, generator_opt=opt, centroids=centroids)
    return state, metrics, jax.lax.stop_gradient(tuple(images))

  def _student_update(self, state, teacher, x, labels, answers):
    """One student update; answers: the teacher's."""
    layers = fake_quant.layer_set(
      self.plan, observe=not self.plan.learned, dtype=self.dtype
    )
    network = self._network(layers)
    batch_stats = teacher['batch_stats']
    w = self.weights

    def loss_fn(trained):
      variables = {**state.student, **trained, 'batch_stats': batch_stats}
      (logits, features), seen = self._answers(network, variables, x, 'ranges')
      entropy = losses.inception_loss(logits, labels)
      divergence = losses.distillation_loss(logits, answers.logits)
      loss = w.student_cross_entropy * entropy + w.distillation * divergence
      agree = jnp.argmax(logits, -1) == jnp.argmax(answers.logits, -1)
      terms = {
        'cross_entropy': entropy,
        'distillation': divergence,
        'agreement': jnp.mean(agree),
      }
      if w.features:
        terms['features'] = losses.features_loss(features, answers.features)
        loss += w.features * terms['features']
      terms['loss'] = loss
      return loss, (terms, seen)

    trained = self._trained(state.student)
    grads, (terms, seen) = jax.grad(loss_fn, has_aux=True)(trained)
    updates, opt = self.student_optimizer.update(
      grads, state.student_opt, trained
    )
    rates = {'params': self.student_lr, 'quant': self.quant_lr}
    new = {
      key: _apply(trained[key], updates[key], rates[key](state.step))
      for key in trained
    }
    student = {**state.student, **new}
    if not self.plan.learned:
      student['quant'] = self._adapt_ranges(student['quant'], seen, state.step)
    metrics = {f'student/{k}': v for k, v in terms.items()}
    return state.replace(student=student, student_opt=opt), metrics

  def _adapt_ranges(self, quant, seen, step):
    weight = jnp.where(step < self.range_steps, 1 - _RANGE_DECAY, 0.0)
    return jax.tree.map(
      lambda old, new: (1 - weight) * old + weight * new, quant, seen['ranges']
    )

  def _finish(self, state: TrainState, metrics: Metrics):
    # Parameters too: a diverged update shows in the loss only a step later,
    # and a checkpoint could lie between.
    terms = [v for k, v in metrics.items() if k.endswith('/loss')]
    norms = [
      optax.tree.norm(state.generator),
      optax.tree.norm(state.student),
    ]
    bad = (state.bad_step < 0) & ~jnp.isfinite(sum(terms + norms))
    return (
      state.replace(
        step=state.step + 1,
        bad_step=jnp.where(bad, state.step, state.bad_step),
      ),
      metrics,
    )

  def _remember(self, state: TrainState, images: jax.Array) -> TrainState:
    """Puts a batch of generator images into the pool, oldest out."""
    if state.pool is None or not self.pool_batches:
      return state
    start = (state.step % self.pool_batches) * self.batch_size
    pixels = self.preprocessing.to_pixels(images)
    pool = jax.lax.dynamic_update_slice_in_dim(state.pool, pixels, start, 0)
    return state.replace(pool=pool)

  def warmup_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Generator, L1 (eq. 7). key: of the run; returns (state, metrics)."""
    key = jax.random.fold_in(key, state.step)
    state, metrics, _ = self._generator_update(
      state, teacher, key, class_terms=False
    )
    return self._finish(state, metrics)

  def generator_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Generator, L2 (eq. 10); its images go to the pool."""
    key = jax.random.fold_in(key, state.step)
    state, metrics, (images, *_) = self._generator_update(
      state, teacher, key, class_terms=True
    )
    return self._finish(self._remember(state, images), metrics)

  def procedural_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Procedural images of the pool: towards the stored statistics.

    A batch after the other, and all of them `procedural.STEPS` times. Eq. 9,
    relative to the stored deviations, for pixels in place of a generator (as
    ZeroQ, Cai et al., arXiv 2001.00281, from noise).
    """
    pool = state.pool
    assert pool is not None
    done = state.step - self.procedural_start
    batch = done % self.procedural_batches
    start = (self.pool_batches + batch) * self.batch_size
    stored = losses.stored_statistics(
      teacher['batch_stats'], self.graph.batch_norms
    )

    def make():
      return procedural.dead_leaves(
        jax.random.fold_in(key, state.step),
        self.batch_size,
        self.generator.shape,
      )

    pixels = jax.lax.dynamic_slice_in_dim(pool, start, self.batch_size)
    x = jax.lax.cond(
      done < self.procedural_batches,
      make,
      lambda: self.preprocessing.normalize(pixels),
    )

    def loss_fn(x):
      _, moments = self.teach(teacher, x)
      found = [batch_statistics(m) for m in moments]
      return losses.statistics_loss(
        losses.relative(found, stored), losses.relative(stored, stored)
      )

    x = sharding.split_batch(self.mesh, x)
    loss, gradient = jax.value_and_grad(loss_fn)(x)
    # The pool holds pixels: steps of one size outlast the rounding.
    pixels = self.preprocessing.to_pixels(x - _PIXEL_STEP * jnp.sign(gradient))
    pool = jax.lax.dynamic_update_slice_in_dim(pool, pixels, start, 0)
    return self._finish(state.replace(pool=pool), {'procedural/loss': loss})

  def joint_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Generator, L2, and student, L3, on the same images (eqs. 10, 11)."""
    key = jax.random.fold_in(key, state.step)
    state, metrics, (images, x, labels, answers) = self._generator_update(
      state, teacher, key, class_terms=True, augmented=True
    )
    state, more = self._student_update(state, teacher, x, labels, answers)
    return self._finish(self._remember(state, images), {**metrics, **more})

  def student_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Student, L3, on images drawn from the pool.

    The label of a pool image is the teacher's answer.
    """
    key = jax.random.fold_in(key, state.step)
    draw_key, augment_key, mix_key, size_key = jax.random.split(key, 4)
    assert state.pool is not None
    rows = jax.random.randint(
      draw_key, (self.batch_size,), 0, state.pool.shape[0]
    )
    pixels = sharding.split_batch(self.mesh, state.pool[rows])
    x = self._augment(augment_key, self.preprocessing.normalize(pixels))
    x = augment.mixup(mix_key, x, self.augment_mixup)
    x = self._harden(size_key, state, teacher, x)
    network = self._network(float_layers.layer_set(dtype=self.dtype))
    answers, _ = jax.lax.stop_gradient(self._answers(network, teacher, x))
    labels = jnp.argmax(answers.logits, -1)
    state, metrics = self._student_update(state, teacher, x, labels, answers)
    return self._finish(state, metrics)


def _apply(params, updates, rate):
  return jax.tree.map(lambda p, u: p - rate * u, params, updates)
