"""The steps of the method, as pure functions of the train state.

    step              updates                            loss
    generator_step    generator                          L1 (eq. 7), L2 (eq. 10)
    procedural_step   pixels of procedural images        eq. 9
    joint_step        generator; student on its images   L2; L3 (eq. 11)
    student_step      student on images of the pool      L3

Two transitions run between phases: `initialize_centroids` and
`calibrate_student`. All are methods of `Steps`, whose attributes are static.
Arrays are arguments.

References:
  Gao et al., ClusterQ, arXiv 2205.00179. The phase of `student_step` is not in
  the paper. As in IntraQ and HAST, the student learns from a fixed set.
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
from clusterq_jax.ops.moments import Statistics
from clusterq_jax.quant import quantizers

StepResult = tuple[TrainState, Metrics]
Step = Callable[[TrainState, Any, jax.Array], StepResult]
_RANGE_DECAY = 0.9  # decay of the moving average of ranges, per student step
_RANGE_STEPS = 800  # student steps in which ranges that are not learned adapt
_CALIBRATION_BATCHES = 4  # maximum number of procedural batches to calibrate on
# Sizes of the steps of a procedural image: the first one, in normalised pixel
# units, and the ratio of each to the one before. Five such steps reach the loss
# of ten of 0.03.
_PIXEL_STEP, _PIXEL_DECAY = 0.08, 0.7
_MOVED = 4  # one of so many images of a student step is a moved one


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of a run, with everything that stays fixed during the run.

  Attributes:
    networks: teacher, student and generator.
    config: complete configuration.
    pool: layout of the pool.
    first_semantic_layer: index of the first BatchNorm with class terms.
    generator_optimizer: optimiser of the generator's parameters.
    student_optimizer: optimiser of the student.
    range_steps: number of student steps in which activation ranges that are not
      learned adapt.
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
    """Returns the slice of BatchNorms with class terms."""
    return slice(self.first_semantic_layer, None)

  # ------------------------------------------------------------ the state

  def init(self, key: jax.Array, teacher: Any) -> TrainState:
    """Returns the state before the first step, with an uncalibrated student."""
    networks = self.networks
    z = jnp.zeros((1, networks.generator.latent_dim))
    labels = jnp.zeros((1,), int)
    generator = networks.generator.init(key, z, labels)['params']
    params = jax.tree.map(jnp.asarray, teacher['params'])
    quant = quantizers.uncalibrated(networks.plan, params)
    student = {'params': params, 'quant': quant}
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
      moved=self._nothing_moved(),
      bad_step=jnp.full((), -1, jnp.int32),
    )

  def _nothing_moved(self) -> jax.Array | None:
    """Returns the images that `student_step` moves, before its first call."""
    s = self.config.schedule
    if not s.student_steps or not self.config.augment.adversarial:
      return None
    return jnp.zeros((s.batch_size // _MOVED, *self.networks.generator.shape))

  def abstract_state(self, key: jax.Array, teacher: Any) -> TrainState:
    """Returns shapes, dtypes and shardings of `init(key, teacher)`."""
    everywhere = sharding.replicated(self.networks.mesh)
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere),
      jax.eval_shape(self.init, key, teacher),
    )

  def _trained(self, student: Any) -> Any:
    """Returns the part of the student that its optimiser updates."""
    learned = self.networks.plan.learned
    return student if learned else {'params': student['params']}

  # ---------------------------------------------------------- transitions

  def initialize_centroids(
    self, state: TrainState, teacher: Any, keys: jax.Array
  ) -> TrainState:
    """Averages class moments over generator images.

    Args:
      state: train state with empty centroids.
      teacher: variables of the teacher.
      keys: PRNG keys, one for each batch of images.
    """

    def batch(key):
      x, labels = self.networks.generate(state.generator, key)
      answers, moments = self.networks.teach(teacher, x)
      return moments[self._semantic], classes_of(labels, answers.logits)

    centroids = centroids_lib.average(state.centroids, batch, keys)
    return state.replace(centroids=centroids)

  def calibrate_student(
    self, state: TrainState, teacher: Any, key: jax.Array
  ) -> TrainState:
    """Makes the student from procedural images, or generated ones if none."""
    if self.pool.procedural:
      assert state.pool is not None
      x = self.pool.first_procedural(state.pool, _CALIBRATION_BATCHES)
    else:
      x, _ = self.networks.generate(state.generator, key)
    student = calibration.calibrate(self.networks, teacher, x)
    state = state.replace(student=student)
    if state.moved is not None:
      state = state.replace(moved=x[: len(state.moved)])
    return state

  # -------------------------------------------------------- the generator

  def _see(
    self, params: Any, teacher: Any, image_key, augment_key=None
  ) -> Generated:
    """Generates images and runs the teacher on them.

    Args:
      params: parameters of the generator.
      teacher: variables of the teacher.
      image_key: PRNG key of the images.
      augment_key: PRNG key of the augmentation; None leaves it out.
    """
    images, labels = self.networks.generate(params, image_key)
    x = images if augment_key is None else self._augment(augment_key, images)
    answers, moments = self.networks.teach(teacher, x)
    return Generated(images, x, labels, answers, moments)

  def _augment(self, key: jax.Array, x: jax.Array) -> jax.Array:
    """Augments images with the configured probability."""
    a = self.config.augment
    return augment.random_resized_crop_and_flip(key, x, a.probability, a.flip)

  def _stored(self, teacher: Any) -> tuple[Statistics, ...]:
    """Returns the teacher's BatchNorm statistics, [C_l] in each layer."""
    names = self.networks.graph.batch_norms
    return losses.stored_statistics(teacher['batch_stats'], names)

  def _move_generator(
    self, state: TrainState, loss: Callable[[Any], tuple[jax.Array, Any]]
  ) -> tuple[TrainState, Any]:
    """Updates the generator once.

    Args:
      state: train state.
      loss: maps the generator's parameters to the loss and other values.

    Returns:
      The new state and the other values.
    """
    grads, more = jax.grad(loss, has_aux=True)(state.generator)
    updates, opt = self.generator_optimizer.update(
      grads, state.generator_opt, state.generator
    )
    new = optax.apply_updates(state.generator, updates)
    return state.replace(generator=new, generator_opt=opt), more

  def _move_by_l2(
    self,
    state: TrainState,
    teacher: Any,
    key: jax.Array,
    augmented: bool = False,
    after_warmup: jax.Array | bool = True,
  ) -> tuple[TrainState, Metrics, Generated]:
    """Updates the generator once on L2 and stores its images in the pool.

    Args:
      state: train state.
      teacher: variables of the teacher.
      key: PRNG key of the step.
      augmented: whether the teacher sees augmented images.
      after_warmup: see `objectives.l2`.
    """
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
        after_warmup,
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
  ) -> tuple[TrainState, Metrics, jax.Array]:
    """Updates the student once on L3 (eq. 11).

    Args:
      state: train state.
      teacher: variables of the teacher.
      x: normalised images, [B, H, W, C].
      labels: int [B].
      answers: the teacher's answers to x.

    Returns:
      The new state, the metrics, and d loss / d x with the answers held fixed.
    """
    networks = self.networks
    layers = fake_quant.layer_set(
      networks.plan, observe=not networks.plan.learned, dtype=networks.dtype
    )
    network = networks.build(layers)

    def loss_fn(trained, x):
      batch_stats = teacher['batch_stats']
      variables = {**state.student, **trained, 'batch_stats': batch_stats}
      own, seen = networks.answers(network, variables, x, 'ranges')
      terms = objectives.l3(self.config.loss, own, answers, labels)
      return terms['loss'], (terms, seen)

    trained = self._trained(state.student)
    (grads, dx), (terms, seen) = jax.grad(loss_fn, (0, 1), has_aux=True)(
      trained, x
    )
    updates, opt = self.student_optimizer.update(
      grads, state.student_opt, trained
    )
    student = {**state.student, **optax.apply_updates(trained, updates)}
    if not networks.plan.learned:
      student['quant'] = self._adapt_ranges(student['quant'], seen, state.step)
    state = state.replace(student=student, student_opt=opt)
    return state, _named('student', terms), dx

  def _adapt_ranges(self, quant: Any, seen: Any, step: jax.Array) -> Any:
    """Moves activation ranges that are not learned towards the batch's."""
    end = phases.student_start(self.config.schedule) + self.range_steps
    weight = jnp.where(step < end, 1 - _RANGE_DECAY, 0.0)
    return jax.tree.map(
      lambda old, new: (1 - weight) * old + weight * new, quant, seen['ranges']
    )

  # ------------------------------------------------------------ the steps
  #
  # Each step takes (state, teacher, key) and returns the new state and metrics.
  # The key is the same for the whole run. Each step folds its number into it.

  def repeated(self, step: Step) -> Callable[..., StepResult]:
    """Returns a function that makes several steps of one kind on the device.

    The number of steps is an argument, so one program serves every number and
    gives the same bits in calls of any length.

    Args:
      step: one of the steps below.

    Returns:
      A function of (state, teacher, key, count). `count` is int32 [], at least
      1. The metrics are those of the last step.
    """
    traced = jax.jit(step)  # once, for its shapes and for the loop

    def steps(state, teacher, key, count):
      def body(_, carry):
        new = traced(carry[0], teacher, key)
        return sharding.replicate(self.networks.mesh, new)

      shapes = jax.eval_shape(traced, state, teacher, key)[1]
      none = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      return jax.lax.fori_loop(0, count, body, (state, none))

    steps.__name__ = step.__name__
    return steps

  def generator_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Updates the generator on L1 or L2 and puts its images in the pool.

    It is L1 (eq. 7) during the warm-up and L2 (eq. 10) after it. One program
    for both compiles in half the time.
    """
    key = jax.random.fold_in(key, state.step)
    after_warmup = state.step >= self.config.schedule.warmup_steps
    state, metrics, _ = self._move_by_l2(
      state, teacher, key, after_warmup=after_warmup
    )
    return state.count_step(metrics), metrics

  def procedural_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Moves a batch of procedural images towards the stored statistics.

    The batches take turns, and each gets `phases.PROCEDURAL_STEPS` steps. The
    first step of a batch draws its images.

    References:
      Cai et al., ZeroQ, arXiv 2001.00281, which starts from noise.
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
      return objectives.procedural(moments, stored)

    x = sharding.split_batch(self.networks.mesh, x)
    loss, gradient = jax.value_and_grad(loss_fn)(x)
    # The pool rounds to uint8, which would undo small steps. So all pixels move
    # by the same length.
    length = _PIXEL_STEP * _PIXEL_DECAY ** (done // layout.procedural)
    pixels = prep.to_pixels(x - length * jnp.sign(gradient))
    pool = jax.lax.dynamic_update_slice_in_dim(pool, pixels, start, 0)
    metrics = {'procedural/loss': loss}
    return state.replace(pool=pool).count_step(metrics), metrics

  def joint_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Updates generator (L2) and student (L3) on the same images."""
    key = jax.random.fold_in(key, state.step)
    state, metrics, seen = self._move_by_l2(state, teacher, key, augmented=True)
    state, more, _ = self._move_student(
      state, teacher, seen.x, seen.labels, seen.answers
    )
    metrics |= more
    return state.count_step(metrics), metrics

  def student_step(self, state: TrainState, teacher: Any, key: jax.Array):
    """Updates the student (L3) on images drawn from the pool.

    Most images are new. The others are new ones of the step before, moved to
    increase its loss. Its update gave the direction, so they cost no pass of
    their own. The label of an image is the class that the teacher predicts.

    References:
      Shafahi et al., arXiv 1904.12843, also take adversarial directions from
      the backward pass that updates the weights.
    """
    key = jax.random.fold_in(key, state.step)
    draw_key, augment_key, mix_key, size_key = jax.random.split(key, 4)
    assert state.pool is not None
    moved = () if state.moved is None else (state.moved,)
    count = self.networks.batch_size - sum(map(len, moved))
    rows = jax.random.randint(draw_key, (count,), 0, len(state.pool))
    pixels = sharding.split_batch(self.networks.mesh, state.pool[rows])
    fresh = self._augment(
      augment_key, self.networks.preprocessing.normalize(pixels)
    )
    fresh = augment.mixup(mix_key, fresh, self.config.augment.mixup)
    x = jnp.concatenate([fresh, *moved])
    x = sharding.split_batch(self.networks.mesh, x)
    answers = self.networks.teacher_answers(teacher, x)
    labels = jnp.argmax(answers.logits, -1)
    state, metrics, dx = self._move_student(state, teacher, x, labels, answers)
    if state.moved is not None:
      ahead = fresh[: len(state.moved)]
      largest = self.config.augment.adversarial
      ahead = augment.adversarial(size_key, ahead, dx[: len(ahead)], largest)
      state = state.replace(moved=ahead)
    return state.count_step(metrics), metrics


def _named(owner: str, terms: Metrics) -> Metrics:
  """Puts the owner of the terms before their names."""
  return {f'{owner}/{name}': value for name, value in terms.items()}
