"""Parts of the state that each step changes, and parts that it reads.

The tests run the programs that the finished run compiled.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax import config as config_lib
from clusterq_jax import weights
from clusterq_jax.layers import fake_quant
from clusterq_jax.method import objectives, phases, procedural
from clusterq_jax.method.pool import PoolLayout
from clusterq_jax.ops.moments import batch_statistics
from clusterq_jax.runtime import session as session_lib

_JOINT = 5  # start of the joint phase in the tiny schedule; see conftest


@pytest.fixture
def state(state_at):
  """Returns a state of the student phase, in which every part has changed."""
  return state_at(8)


@pytest.fixture
def step(finished):
  """Calls a program on a copy of a state, because it donates the state."""

  def call(name, state, at=None, variables=None):
    state = jax.tree.map(jnp.copy, state)
    if at is not None:
      state = state.replace(step=jnp.full((), at, jnp.int32))
      state = jax.device_put(state, state.pool.sharding)
    variables = finished.variables if variables is None else variables
    return finished.programs[name](state, variables, finished.key)

  return call


def _same(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in leaves)


def _all_moved(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(not np.array_equal(x, y) for x, y in leaves)


def _poison(tree):
  return jax.tree.map(lambda a: a.at[...].set(jnp.nan), tree)


# --- bfloat16 ----------------------------------------------------------------


def _convolutions(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'conv_general_dilated':
      yield equation
    for parameter in jax.tree.leaves(
      equation.params, is_leaf=lambda p: hasattr(p, 'eqns')
    ):
      inner = getattr(parameter, 'jaxpr', parameter)
      if hasattr(inner, 'eqns'):
        yield from _convolutions(inner)


def _types(tree):
  return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


@pytest.mark.parametrize('name', ['joint_step', 'student_step'])
def test_convolutions_alone_are_in_bfloat16(finished, tiny_config, state, name):
  tiny_config.compute_dtype = 'bfloat16'
  steps = session_lib.make_steps(
    config_lib.resolve(tiny_config), finished.teacher
  )
  args = state, finished.variables, finished.key
  jaxpr = jax.make_jaxpr(getattr(steps, name))(*args)
  found = list(_convolutions(jaxpr.jaxpr))
  assert len(found) > 20
  for equation in found:
    for variable in (*equation.invars, *equation.outvars):
      assert variable.aval.dtype == jnp.bfloat16, equation
  new, metrics = jax.eval_shape(getattr(steps, name), *args)
  assert _types(new) == _types(state)
  assert {m.dtype for m in metrics.values()} == {np.dtype(np.float32)}


# --- Procedural images -------------------------------------------------------


def _distance(finished, pixels):
  """Computes the distance of image statistics from stored ones, in stds."""
  networks, stats = finished.networks, finished.variables['batch_stats']
  x = networks.preprocessing.normalize(pixels)
  _, moments = networks.teach(finished.variables, x)
  total = []
  for found, name in zip(moments, networks.graph.batch_norms, strict=True):
    mean, var = stats[name]['mean'], stats[name]['var']
    batch = batch_statistics(found)
    total.append(np.mean(np.square(batch.mean - mean) / var))
    total.append(np.mean(np.square(batch.std / np.sqrt(var) - 1)))
  return np.mean(total)


@pytest.mark.slow
def test_procedural_steps_fill_their_part_of_the_pool(finished, state):
  first, batch = len(state.pool), finished.networks.batch_size
  s = dataclasses.replace(
    finished.steps.config.schedule, warmup_steps=8, generator_steps=0
  )
  steps = dataclasses.replace(
    finished.steps,
    config=dataclasses.replace(finished.steps.config, schedule=s),
    pool=PoolLayout(2, 2, batch, finished.networks.preprocessing),
  )
  pool = jnp.concatenate([state.pool, jnp.zeros_like(state.pool[: 2 * batch])])
  run = jax.jit(steps.procedural_step)
  seen, now = [], state.replace(pool=pool)
  for _ in range(2 * phases.PROCEDURAL_STEPS):
    now, metrics = run(now, finished.variables, finished.key)
    seen.append(now.pool[first:])
  assert now.step == 8 + 2 * phases.PROCEDURAL_STEPS
  assert metrics['procedural/loss'] > 0
  for part in ('generator', 'student', 'centroids'):
    assert _same(getattr(now, part), getattr(state, part)), part
  np.testing.assert_array_equal(now.pool[:first], state.pool)
  # The batches take turns.
  assert not seen[0][batch:].any()
  np.testing.assert_array_equal(seen[1][:batch], seen[0][:batch])
  prep = finished.networks.preprocessing
  for i, own in enumerate((slice(None, batch), slice(batch, None))):
    key = jax.random.fold_in(finished.key, 8 + i)
    begun = prep.to_pixels(procedural.dead_leaves(key, batch, prep.shape))
    done = seen[-1][own]
    assert _distance(finished, done) < 0.7 * _distance(finished, begun)
    # The images stay similar to their first version.
    assert np.corrcoef(np.ravel(begun), np.ravel(done))[0, 1] > 0.8
  assert not _same(seen[-1][:batch], seen[-1][batch:])

  # These images calibrate the student.
  images = steps.pool.first_procedural(now.pool, batches=4)
  np.testing.assert_array_equal(images, prep.normalize(seen[-1]))
  assert len(steps.pool.first_procedural(now.pool, batches=1)) == batch


# --- Changed parts -----------------------------------------------------------


def test_warmup_moves_the_generator_alone(step, state, finished):
  new, metrics = step('generator_step', state, at=1)
  assert new.step == 2
  assert _all_moved(new.generator, state.generator)
  for part in ('student', 'student_opt', 'centroids', 'bad_step'):
    assert _same(getattr(new, part), getattr(state, part)), part
  assert metrics['generator/sfda'] == metrics['generator/diversity'] == 0
  m = {key: float(value) for key, value in metrics.items()}
  weight = finished.config.loss.statistics
  assert m['generator/loss'] == pytest.approx(
    m['generator/inception'] + weight * m['generator/statistics'], rel=1e-6
  )


def test_generator_step_leaves_the_student(step, state):
  new, metrics = step('generator_step', state, at=3)
  assert _all_moved(new.generator, state.generator)
  assert not _same(new.centroids, state.centroids)
  assert not _same(new.pool, state.pool)
  assert _same(new.student, state.student)
  assert _same(new.student_opt, state.student_opt)
  assert metrics['generator/sfda'] > 0
  assert metrics['generator/diversity'] > 0


def test_joint_step_moves_both(step, state):
  new, metrics = step('joint_step', state, at=5)
  assert _all_moved(new.generator, state.generator)
  assert _all_moved(new.student['params'], state.student['params'])
  assert not _same(new.student_opt, state.student_opt)
  assert not _same(new.centroids, state.centroids)
  assert {'generator/loss', 'student/loss'} < set(metrics)


def test_student_step_moves_the_student_alone(step, state):
  new, metrics = step('student_step', state)
  assert _all_moved(new.student['params'], state.student['params'])
  for part in ('generator', 'generator_opt', 'centroids', 'pool'):
    assert _same(getattr(new, part), getattr(state, part)), part
  assert all(name.startswith('student/') for name in metrics)


def test_loss_is_the_weighted_sum(step, state, finished):
  weights = finished.config.loss
  _, metrics = step('joint_step', state, at=5)
  m = {k: float(v) for k, v in metrics.items()}
  assert m['generator/loss'] == pytest.approx(
    m['generator/inception']
    + weights.statistics * m['generator/statistics']
    + weights.sfda * m['generator/sfda']
    + weights.diversity * m['generator/diversity'],
    rel=1e-5,
  )
  assert m['student/loss'] == pytest.approx(
    m['student/cross_entropy']
    + m['student/distillation']
    + weights.features * m['student/features'],
    rel=1e-5,
  )


# --- The student's inputs ----------------------------------------------------


def _images(finished, state, at):
  """Generates the images and labels of the step `at`."""
  key = jax.random.fold_in(finished.key, at)
  return jax.jit(finished.networks.generate)(
    state.generator, jax.random.split(key, 3)[0]
  )


@pytest.mark.parametrize(
  ('name', 'at'), [('generator_step', 3), ('joint_step', 6)]
)
def test_pool_holds_generator_images(step, state, finished, name, at):
  new, _ = step(name, state, at=at)
  images, _ = _images(finished, state, at)
  pixels = finished.teacher.preprocessing.to_pixels(images)
  batch = finished.config.schedule.batch_size
  halves = slice(0, batch), slice(batch, 2 * batch)  # two batches deep
  slot, rest = halves[at % 2], halves[1 - at % 2]
  assert new.pool.dtype == jnp.uint8
  assert np.ptp(np.asarray(pixels)) > 100
  # Another program may round a pixel near the middle to the other side.
  difference = np.abs(np.int32(new.pool[slot]) - np.int32(pixels))
  assert difference.max() <= 1
  assert difference.mean() < 0.01
  np.testing.assert_array_equal(new.pool[rest], state.pool[rest])


def test_student_step_sees_the_pool_and_nothing_else(step, state):
  new, metrics = step('student_step', state)
  other = state.replace(
    generator=_poison(state.generator), centroids=_poison_centroids(state)
  )
  again, same = step('student_step', other)
  assert _same(metrics, same)
  assert _same(new.student, again.student)
  _, different = step('student_step', state.replace(pool=255 - state.pool))
  assert float(different['student/loss']) != float(metrics['student/loss'])


def test_a_quarter_of_the_images_move(step, state, finished):
  new, _ = step('student_step', state)
  fresh = _student_images(state, finished)
  assert (len(fresh), len(new.moved)) == (6, 2)
  moves = new.moved - fresh[:2]
  distance = np.abs(np.asarray(moves)).max((1, 2, 3))
  assert ((0 < distance) & (distance < 0.0101)).all()
  assert distance[0] != distance[1]  # each image has its own step length

  @jax.jit
  @jax.grad
  def gradient(x):
    networks, teacher = finished.networks, finished.variables
    network = networks.build(fake_quant.layer_set(networks.plan))
    variables = {**state.student, 'batch_stats': teacher['batch_stats']}
    student, _ = networks.answers(network, variables, x)
    answers = networks.teacher_answers(teacher, x)
    labels = jnp.argmax(answers.logits, -1)
    weights = finished.steps.config.loss
    return objectives.l3(weights, student, answers, labels)['loss']

  # To where the loss grows, if the teacher's answers stay.
  uphill = gradient(jnp.concatenate([fresh, state.moved]))[:2]
  same = jnp.sign(moves) == jnp.sign(uphill)
  assert jnp.mean(same) > 0.98


def test_moved_images_are_part_of_the_next_step(step, state):
  _, metrics = step('student_step', state)
  assert not _same(state.moved, jnp.zeros_like(state.moved))
  _, other = step('student_step', state.replace(moved=-state.moved))
  assert float(other['student/loss']) != float(metrics['student/loss'])


def _poison_centroids(state):
  return state.centroids.replace(layers=_poison(state.centroids.layers))


def _student_images(state, finished):
  """Computes the new images of step 8 from the pool's pixels, with NumPy."""
  key = jax.random.fold_in(finished.key, 8)
  draw_key, augment_key, *_ = jax.random.split(key, 4)
  rows = jax.random.randint(draw_key, (6,), 0, 16)
  pixels = np.float64(np.asarray(state.pool)[np.asarray(rows)])
  prep = finished.teacher.preprocessing
  x = (pixels / 255 - np.array(prep.mean)) / np.array(prep.std)
  return finished.steps._augment(augment_key, jnp.float32(x))


@pytest.mark.slow
def test_student_loss_is_that_of_pool_images(step, state, finished):
  """Computes the loss from the pool's pixels with independent code."""
  fresh = _student_images(state, finished)
  x = jnp.concatenate([fresh, state.moved])
  _, metrics = step('student_step', state)

  @jax.jit
  def logits(x):
    teacher = finished.networks.teacher_logits(finished.variables, x)
    return teacher, finished.networks.student_logits(
      state.student, finished.variables, x
    )

  teacher, student = (
    np.float64(jax.nn.log_softmax(a)) for a in logits(jnp.float32(x))
  )
  labels = teacher.argmax(-1)
  entropy = -student[np.arange(8), labels].mean()
  divergence = (np.exp(teacher) * (teacher - student)).sum(-1).mean()
  assert float(metrics['student/cross_entropy']) == pytest.approx(
    entropy, rel=1e-3
  )
  assert float(metrics['student/distillation']) == pytest.approx(
    divergence, rel=1e-2
  )
  assert float(metrics['student/features']) > 1e-3


def test_student_batch_norm_statistics_are_the_teachers(
  step, state, finished, tiny_teacher
):
  assert set(state.student) == {'params', 'quant'}
  written, _ = weights.read_tensors(finished.workdir / 'student.safetensors')
  given, _ = weights.read_tensors(tiny_teacher)
  names = [name for name in given if name.startswith('batch_stats/')]
  assert names
  for name in names:
    np.testing.assert_array_equal(written[name], given[name])
  # A step reads them from the teacher: other statistics change the loss.
  shifted = {
    **finished.variables,
    'batch_stats': jax.tree.map(
      lambda a: 2 * a, finished.variables['batch_stats']
    ),
  }
  _, before = step('student_step', state)
  _, after = step('student_step', state, variables=shifted)
  assert float(before['student/loss']) != float(after['student/loss'])


@pytest.mark.slow
def test_student_ranges_freeze(state, finished):
  steps = dataclasses.replace(finished.steps, range_steps=2)
  run = jax.jit(steps.student_step)

  def quant_after(step):
    before = state.replace(step=jnp.full((), step, jnp.int32))
    return run(before, finished.variables, finished.key)[0].student['quant']

  assert not _same(quant_after(_JOINT + 1), state.student['quant'])
  assert _same(quant_after(_JOINT + 2), state.student['quant'])


# --- Centroids ---------------------------------------------------------------


@pytest.fixture
def initial(finished, state):
  """Returns initial centroids, and the keys of their 8 batches of 8 images."""
  empty = jax.tree.map(jnp.zeros_like, state.centroids)
  state = jax.tree.map(jnp.copy, state.replace(centroids=empty))
  keys = jax.random.split(finished.key, 8)
  program = finished.programs['initialize_centroids']
  return program(state, finished.variables, keys).centroids, keys


def test_initial_centroids_differ_between_classes(finished, initial):
  new, _ = initial
  seen = np.flatnonzero(new.seen)
  assert len(seen) >= 3
  assert len(new.layers) == len(finished.networks.graph.batch_norms) - (
    finished.steps.first_semantic_layer
  )
  for layer in new.layers:
    for statistic in layer:
      values = np.asarray(statistic)
      assert np.isfinite(values).all()
      for i in seen:
        for j in seen[seen > i]:
          assert np.abs(values[i] - values[j]).max() > 1e-3
      unseen = np.setdiff1d(np.arange(4), seen)
      assert (values[unseen] == 0).all()


def test_initial_centroids_are_means_over_all_images(finished, state, initial):
  new, keys = initial

  @jax.jit
  def batch(key):
    x, labels = finished.networks.generate(state.generator, key)
    answers, moments = finished.networks.teach(finished.variables, x)
    return labels, jnp.argmax(answers.logits, -1), moments

  batches = jax.device_get([batch(key) for key in keys])
  labels, answers, moments = jax.tree.map(
    lambda *a: np.concatenate(a), *batches
  )
  semantic = moments[finished.steps.first_semantic_layer :]
  for c in range(4):
    members = (labels == c) & (answers == c)
    assert new.seen[c] == members.any()
    for layer, sample in zip(new.layers, semantic, strict=True):
      mean, var = (a[members].astype(np.float64) for a in sample)
      expected = mean, mean**2, var
      for found, array in zip(layer, expected, strict=True):
        if members.any():
          np.testing.assert_allclose(
            found[c], array.mean(0), rtol=1e-3, atol=1e-4
          )


# --- Bookkeeping -------------------------------------------------------------


def test_bad_step_is_the_first_without_a_finite_loss(step, state):
  assert state.bad_step == -1
  bad, metrics = step(
    'generator_step', state.replace(generator=_poison(state.generator)), at=1
  )
  assert math.isnan(metrics['generator/loss'])
  assert bad.bad_step == 1
  later, _ = step('generator_step', bad)
  assert later.step == 3
  assert later.bad_step == 1
  student = {**state.student, 'params': _poison(state.student['params'])}
  bad, _ = step('student_step', state.replace(student=student))
  assert bad.bad_step == 8
  good, _ = step('student_step', state)
  assert good.bad_step == -1


def test_every_program_is_compiled_once(finished, step, state):
  names = finished.compiled
  assert sorted(names) == sorted(set(names))
  assert names == (
    'generator_step',
    'initialize_centroids',
    'calibrate_student',
    'joint_step',
    'student_step',
    'sample',
    'held_out',
  )
  # Programs reject other shapes instead of recompiling.
  with pytest.raises(TypeError):
    step('student_step', state.replace(pool=state.pool[:8]))
