"""Learning rates, measured as updates for gradients of 1."""

import jax
import jax.numpy as jnp
import numpy as np

from clusterq_jax import config as config_lib
from clusterq_jax.method import optimizers


def _config(optimizer, decay):
  config = config_lib.paper_config()
  config.student.optimizer = optimizer
  config.student.quant_lr = 1e-3
  config.schedule.lr_decay = decay
  config.schedule.warmup_steps = 2
  config.schedule.generator_steps = 3
  config.schedule.joint_steps = 2
  config.schedule.student_steps = 3
  config.schedule.pool_batches = 2
  return config_lib.resolve(config)


def _updates(optimizer, tree, count):
  """Returns the sizes of the first updates, [count] for each leaf."""
  gradients = jax.tree.map(jnp.ones_like, tree)
  state, found = optimizer.init(tree), []
  for _ in range(count):
    update, state = optimizer.update(gradients, state, tree)
    found.append(jax.tree.map(lambda a: -float(a), update))
  return jax.tree.map(lambda *a: np.array(a), *found)


def _cosine(t):
  return (1 + np.cos(np.pi * np.asarray(t))) / 2


_STUDENT = {'params': jnp.zeros(()), 'quant': jnp.zeros(())}


def test_cosine_runs_over_the_updates_of_each_network():
  config = _config('adam', 'cosine')
  # For a constant gradient, Adam's update is the learning rate.
  generator = _updates(optimizers.for_generator(config), jnp.zeros(()), 7)
  np.testing.assert_allclose(
    generator, 1e-3 * _cosine(np.arange(7) / 7), rtol=1e-4
  )
  student = _updates(optimizers.for_student(config), _STUDENT, 5)
  shape = _cosine(np.arange(5) / 5)
  np.testing.assert_allclose(student['params'], 1e-4 * shape, rtol=1e-4)
  np.testing.assert_allclose(student['quant'], 1e-3 * shape, rtol=1e-4)


def test_steps_are_counted_from_the_start_of_the_run(monkeypatch):
  monkeypatch.setattr(optimizers, '_BOUNDARIES', (3, 6))
  config = _config('adam', 'step')
  by_step = np.array([1] * 3 + [0.1] * 3 + [0.01] * 4)
  generator = _updates(optimizers.for_generator(config), jnp.zeros(()), 7)
  np.testing.assert_allclose(generator, 1e-3 * by_step[:7], rtol=1e-4)
  student = _updates(optimizers.for_student(config), _STUDENT, 5)
  np.testing.assert_allclose(student['params'], 1e-4 * by_step[5:], rtol=1e-4)
  np.testing.assert_allclose(student['quant'], 1e-3 * by_step[5:], rtol=1e-4)


def test_sgd_decays_weights_and_not_steps_of_quantizers():
  tree = {'params': jnp.float32(1000), 'quant': jnp.float32(1000)}
  first = _updates(optimizers.for_student(_config('sgd', 'step')), tree, 1)
  # Nesterov adds 0.9 of the momentum, which is the gradient in the first step.
  np.testing.assert_allclose(first['quant'], 1e-3 * 1.9, rtol=1e-5)
  np.testing.assert_allclose(first['params'], 1e-4 * 1.9 * 1.1, rtol=1e-5)


def test_one_optimizer_serves_students_without_learned_ranges():
  tree = {'params': jnp.zeros(())}
  found = _updates(optimizers.for_student(_config('sgd', 'step')), tree, 1)
  assert found.keys() == {'params'}
