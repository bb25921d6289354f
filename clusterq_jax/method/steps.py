"""The steps of the method, as pure functions of the train state.

    warmup_step      generator, L1 (eq. 7)
    generator_step   generator, L2 (eq. 10)
    procedural_step  pixels of procedural images
    joint_step       generator, L2, and student, L3 (eq. 11), on the same images
    student_step     student, L3, on images of the pool

and the two transitions between phases, `initialize_centroids` and
`calibrate_student`. All are methods of `Steps`, which holds what is static;
arrays come in as arguments.

References:
  Gao et al., ClusterQ, arXiv 2205.00179. The student-only phase is this
  project's: as in IntraQ and HAST, the student learns from a fixed set.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clusterq_jax import sharding
from clusterq_jax.config.fields import Config
from clusterq_jax.layers import fake_quant
from clusterq_jax.method import (
  augment,
  calibration,
  losses,
  objectives,
  phases,
  procedural,
)
from clusterq_jax.method import centroids as centroids_lib
from clusterq_jax.method.class_statistics import classes_of
from clusterq_jax.method.networks import Answers, Networks
from clusterq_jax.method.objectives import Generated, Metrics
from clusterq_jax.method.pool import PoolLayout
from clusterq_jax.method.state import TrainState
from clusterq_jax.ops.moments import Statistics, batch_statistics

StepResult = tuple[TrainState, Metrics]
_RANGE_DECAY = 0.9  # EMA of activation ranges, per student step
_RANGE_STEPS = 800  # student steps in which activation ranges adapt (minmax)
_CALIBRATION_BATCHES = 4
_PIXEL_STEP = 0.03  # of a procedural image, in normalised pixel units


@dataclasses.dataclass(frozen=True)
class Steps:
  """What the steps need to know; see the module docstring for the steps.

  Attributes:
    networks: teacher, student and generator.
    config: sections with the method's numbers.
    pool: where which images of the pool are.
    first_semantic_layer: index of the first BatchNorm with class terms.
    generator_optimizer: learning rate included.
    student_optimizer: learning rates included.
    range_steps: student steps in which activation ranges adapt (minmax).
  """

  networks: Networks
  config: Config
  pool: PoolLayout
  first_semantic_layer: int
  generator_optimizer: optax.GradientTransformation
  student_optimizer: optax.GradientTransformation
  range_steps: int = _RANGE_STEPS

  @property
  def _semantic(self) -> slice:
    return slice(self.first_semantic_layer, None)

  # ------------------------------------------------------------ the state

  def init(self, key: jax.Array, teacher: Any) -> TrainState:
    """Returns the state before the first step; the student is the teacher."""
    networks = self.networks
    z = jnp.zeros((1, networks.generator.latent_dim))
    labels = jnp.zeros((1,), int)
    generator = networks.generator.init(key, z, labels)['params']
    images = (networks.batch_size, *networks.generator.shape)
    shapes = jax.eval_shape(
      lambda teacher, x: calibration.calibrate(networks, teacher, x),
      teacher,
      jax.ShapeDtypeStruct(images, jnp.zeros(()).dtype),
    )
    student = {
      'params': jax.tree.map(jnp.asarray, teacher['params']),
      'quant': jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), shapes['quant']
      ),
    }
    names = networks.graph.batch_norms[self._semantic]
    channels = [teacher['batch_stats'][name]['mean'].shape[0] for name in names]
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      generator=generator,
      generator_opt=self.generator_optimizer.init(generator),
      student=student,
      student_opt=self.student_optimizer.init(self._trained(student)),
      centroids=centroids_lib.empty(networks.num_classes, tuple(channels)),
      pool=self.pool.empty(),
      bad_step=jnp.full((), -1, jnp.int32),
    )

  def abstract_state(self, key: jax.Array, teacher: Any) -> TrainState:
    """Returns shapes, dtypes and shardings of `init(key, teacher)`."""
    everywhere = sharding.replicated(self.networks.mesh)
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere),
      jax.eval_shape(self.init, key, teacher),
    )

  def _trained(self, student: Any) -> Any:
    """Returns the part of the student that its optimiser moves."""
    learned = self.networks.plan.learned
    return student if learned else {'params': student['params']}

  def _finish(self, state: TrainState, metrics: Metrics) -> StepResult:
    """Counts the step, and notes it if something is no longer finite."""
    terms = [v for k, v in metrics.items() if k.endswith('/loss')]
    # Parameters too: a diverged update shows in the loss only a step later, and
    # a checkpoint could lie between.
    norms = [optax.tree.norm(state.generator), optax.tree.norm(state.student)]
    bad = (state.bad_step < 0) & ~jnp.isfinite(sum(terms + norms))
    bad_step = jnp.where(bad, state.step, state.bad_step)
    return state.replace(step=state.step + 1, bad_step=bad_step), metrics

  # ---------------------------------------------------------- transitions

  def initialize_centroids(
    self, state: TrainState, teacher: Any, keys: jax.Array
  ) -> TrainState:
    """Averages class moments over len(keys) batches of the generator."""

    def add_batch(carry, key):
      centroids, count = carry
      x, labels = self.networks.generate(state.generator, key)
      answers, moments = self.networks.teach(teacher, x)
      classes = classes_of(labels, answers.logits)
      count = count.at[labels].add(classes.share > 0)
      # With this weight the moving average is the mean over all images so far.
      beta = classes.size / jnp.maximum(count[labels], 1)
      centroids = centroids_lib.update(
        centroids, moments[self._semantic], classes, beta
      )
      return (centroids, count), None

    count = jnp.zeros((self.networks.num_classes,), jnp.int32)
    (centroids, _), _ = jax.lax.scan(add_batch, (state.centroids, count), keys)
    return state.replace(centroids=centroids)

  def calibrate_student(
    self, state: TrainState, teacher: Any, key: jax.Array
  ) -> TrainState:
    """Makes the student from procedural images, else from generated ones."""
    if self.pool.procedural:
      assert state.pool is not None
      x = self.pool.first_procedural(state.pool, _CALIBRATION_BATCHES)
    else:
      x, _ = self.networks.generate(state.generator, key)
    student = calibration.calibrate(self.networks, teacher, x)
    return state.replace(student=student)

  # -------------------------------------------------------- the generator

  def _see(
    self, params: Any, teacher: Any, image_key, augment_key=None
  ) -> Generated:
    """Generates a batch and shows it to the teacher; augments with a key."""
    images, labels = self.networks.generate(params, image_key)
    x = images if augment_key is None else self._augment(augment_key, images)
    answers, moments = self.networks.teach(teacher, x)
    return Generated(images, x, labels, answers, moments)

  def _augment(self, key: jax.Array, x: jax.Array) -> jax.Array:
    a = self.config.augment
    return augment.random_resized_crop_and_flip(key, x, a.probability, a.flip)

  def _stored(self, teacher: Any) -> tuple[Statistics, ...]:
    names = self.networks.graph.batch_norms
    return losses.stored_statistics(teacher['batch_stats'], names)

  def _move_generator(
    self, state: TrainState, loss: Callable[[Any], tuple[jax.Array, Any]]
  ) -> tuple[TrainState, Any]:
    """Makes one update of the generator; returns what the loss adds to it."""
    grads, more = jax.grad(loss, has_aux=True)(state.generator)
    updates, opt = self.generator_optimizer.update(
      grads, state.generator_opt, state.generator
    )
    new = optax.apply_updates(state.generator, updates)
    return state.replace(generator=new, generator_opt=opt), more

  def _move_by_l2(
    self, state: TrainState, teacher: Any, key: jax.Array, augmented: bool
  ) -> tuple[TrainState, Metrics, Generated]:
    """Makes one update on L2; the pool remembers the images."""
    image_key, augment_key, noise_key = jax.random.split(key, 3)

    def loss(params):
      seen = self._see(
        params, teacher, image_key, augment_key if augmented else None
      )
      terms, centroids = objectives.l2(
        self.config,
        seen,
        self._stored(teacher),
        state.centroids,
        self.first_semantic_layer,
        noise_key,
      )
      return terms['loss'], (terms, centroids, seen)

    state, (terms, centroids, seen) = self._move_generator(state, loss)
    seen = jax.lax.stop_gradient(seen)
    pool = self.pool.remember(state.pool, seen.images, state.step)
    state = state.replace(centroids=centroids, pool=pool)
    return state, _named('generator', terms), seen

  # ---------------------------------------------------------- the student

  def _move_student(
    self,
    state: TrainState,
    teacher: Any,
    x: jax.Array,
    labels: jax.Array,
    answers: Answers,
  ) -> StepResult:
    """Makes one update of the student on L3 (eq. 11).

    Args:
      state: the train state.
      teacher: its variables.
      x: normalised images, [B, H, W, C].
      labels: int [B].
      answers: the teacher's to x.
    """
    networks = self.networks
    layers = fake_quant.layer_set(
      networks.plan, observe=not networks.plan.learned, dtype=networks.dtype
    )
    network = networks.build(layers)

    def loss_fn(trained):
      batch_stats = teacher['batch_stats']
      variables = {**state.student, **trained, 'batch_stats': batch_stats}
      own, seen = networks.answers(network, variables, x, 'ranges')
      terms = objectives.l3(self.config.loss, own, answers, labels)
      return terms['loss'], (terms, seen)

    trained = self._trained(state.student)
    grads, (terms, seen) = jax.grad(loss_fn, has_aux=True)(trained)
    updates, opt = self.student_optimizer.update(
      grads, state.student_opt, trained
    )
    student = {**state.student, **optax.apply_updates(trained, updates)}
    if not networks.plan.learned:
      student['quant'] = self._adapt_ranges(student['quant'], seen, state.step)
    state = state.replace(student=student, student_opt=opt)
    return state, _named('student', terms)

  def _adapt_ranges(self, quant: Any, seen: Any, step: jax.Array) -> Any:
    """Moves activation ranges towards the batch's (minmax ranges)."""
    end = phases.student_start(self.config.schedule) + self.range_steps
    weight = jnp.where(step < end, 1 - _RANGE_DECAY, 0.0)
    return jax.tree.map(
      lambda old, new: (1 - weight) * old + weight * new, quant, seen['ranges']
    )

  def _harden(
    self, key: jax.Array, state: TrainState, teacher: Any, x: jax.Array
  ) -> jax.Array:
    """Moves every other image to where student and teacher differ more."""

    def divergence(x):
      student = self.networks.student_logits(state.student, teacher, x)
      return losses.distillation_loss(
        student, self.networks.teacher_logits(teacher, x)
      )

    largest = self.config.augment.adversarial
    return augment.adversarial(key, x, largest, divergence)

  # ------------------------------------------------------------ the steps
  #
  # Each takes (state, teacher, key), with the key of the run, and returns the
  # new state and the step's metrics.

  def warmup_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Updates the generator on L1 (eq. 7)."""
    key = jax.random.fold_in(key, state.step)
    image_key, *_ = jax.random.split(key, 3)

    def loss(params):
      seen = self._see(params, teacher, image_key)
      terms = objectives.l1(self.config.loss, seen, self._stored(teacher))
      return terms['loss'], terms

    state, terms = self._move_generator(state, loss)
    return self._finish(state, _named('generator', terms))

  def generator_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Updates the generator on L2 (eq. 10); its images go to the pool."""
    key = jax.random.fold_in(key, state.step)
    state, metrics, _ = self._move_by_l2(state, teacher, key, augmented=False)
    return self._finish(state, metrics)

  def procedural_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Moves a batch of procedural images towards the stored statistics.

    The batches take turns; each gets `phases.PROCEDURAL_STEPS` steps. The loss
    is eq. 9 in units of the stored deviations.

    References:
      Cai et al., ZeroQ, arXiv 2001.00281, starts from noise.
    """
    pool, layout = state.pool, self.pool
    assert pool is not None
    s = self.config.schedule
    done = state.step - (s.warmup_steps + s.generator_steps)
    start = layout.procedural_start(done % layout.procedural)
    stored = self._stored(teacher)
    size, prep = layout.batch_size, layout.preprocessing

    def make():
      key_of_batch = jax.random.fold_in(key, state.step)
      return procedural.dead_leaves(key_of_batch, size, prep.shape)

    pixels = jax.lax.dynamic_slice_in_dim(pool, start, size)
    x = jax.lax.cond(
      done < layout.procedural, make, lambda: prep.normalize(pixels)
    )

    def loss_fn(x):
      _, moments = self.networks.teach(teacher, x)
      found = [batch_statistics(m) for m in moments]
      return losses.statistics_loss(
        losses.relative(found, stored), losses.relative(stored, stored)
      )

    x = sharding.split_batch(self.networks.mesh, x)
    loss, gradient = jax.value_and_grad(loss_fn)(x)
    # The pool holds whole pixels: only steps of one size outlast the rounding.
    pixels = prep.to_pixels(x - _PIXEL_STEP * jnp.sign(gradient))
    pool = jax.lax.dynamic_update_slice_in_dim(pool, pixels, start, 0)
    return self._finish(state.replace(pool=pool), {'procedural/loss': loss})

  def joint_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Updates generator (L2) and student (L3) on the same images."""
    key = jax.random.fold_in(key, state.step)
    state, metrics, seen = self._move_by_l2(state, teacher, key, augmented=True)
    state, more = self._move_student(
      state, teacher, seen.x, seen.labels, seen.answers
    )
    return self._finish(state, {**metrics, **more})

  def student_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Updates the student (L3) on images drawn from the pool.

    The label of a pool image is the teacher's answer.
    """
    key = jax.random.fold_in(key, state.step)
    draw_key, augment_key, mix_key, size_key = jax.random.split(key, 4)
    assert state.pool is not None
    rows = jax.random.randint(
      draw_key, (self.networks.batch_size,), 0, state.pool.shape[0]
    )
    pixels = sharding.split_batch(self.networks.mesh, state.pool[rows])
    x = self._augment(
      augment_key, self.networks.preprocessing.normalize(pixels)
    )
    x = augment.mixup(mix_key, x, self.config.augment.mixup)
    x = self._harden(size_key, state, teacher, x)
    answers = self.networks.teacher_answers(teacher, x)
    labels = jnp.argmax(answers.logits, -1)
    state, metrics = self._move_student(state, teacher, x, labels, answers)
    return self._finish(state, metrics)


def _named(owner: str, terms: Metrics) -> Metrics:
  return {f'{owner}/{name}': value for name, value in terms.items()}
