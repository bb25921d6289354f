"""The ablation benchmark: what variants of one seed share."""

import types

import jax.numpy as jnp
import numpy as np

from benchmarks import ablation
from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.method import phases
from clusterq_jax.method.centroids import empty
from clusterq_jax.method.state import TrainState


class _Bench:
  """A bench whose phases only note that they ran, and count."""

  def __init__(self, fields):
    config = config_lib.default_config()
    config.schedule.procedural_batches = 2
    config.schedule.pool_batches = 1
    config.schedule.batch_size = 2
    config.update_from_flattened_dict(fields)
    config = config_lib.resolve(config)
    self.session = types.SimpleNamespace(
      config=config,
      phases=phases.phases(config.schedule),
      mesh=sharding.make_mesh(2),
    )
    self.made: list[str] = []
    number = jnp.zeros((), jnp.int32)
    batches = config.schedule.pool_batches + config.schedule.procedural_batches
    self.state = TrainState(
      step=number,
      generator=number,
      generator_opt=number,
      student=number,
      student_opt=number,
      centroids=empty(1, [1]),
      pool=jnp.zeros((2 * batches, 1), jnp.uint8),
      moved=None,
      bad_step=number - 1,
    )

  def run(self, phase):
    assert int(self.state.step) == phase.start
    self.made.append(phase.name)
    state, drawn = self.state, 2 * self.session.config.schedule.pool_batches
    if phase.name == 'procedural':
      self.state = state.replace(pool=state.pool.at[drawn:].set(9))
      return
    self.state = state.replace(
      generator=state.generator + {'warm-up': 1, 'generator': 10}[phase.name],
      pool=state.pool.at[:drawn].set(7),
    )

  def enter(self, phase):
    assert phase.name == 'student'
    self.made.append('calibrated')


def test_variants_share_what_they_do_not_change():
  stages = ablation.Stages()

  def made(fields):
    bench = _Bench(fields)
    stages.bring(bench, fields)
    schedule = bench.session.config.schedule
    assert int(bench.state.generator) == 10 + (schedule.warmup_steps > 0)
    drawn, made = 2 * schedule.pool_batches, 2 * schedule.procedural_batches
    assert np.ravel(bench.state.pool).tolist() == drawn * [7] + made * [9]
    assert int(bench.state.step) == bench.session.phases[-1].start
    assert bench.made.pop() == 'calibrated'
    return bench.made

  def fields(group, name):
    return ablation.GROUPS[group][name][1]

  assert made({}) == ['warm-up', 'generator', 'procedural']
  assert made({'quant.weight_bits': 3}) == []
  assert made(fields('ideas', 'no_features')) == []
  assert made(fields('ideas', 'no_procedural')) == []
  assert made(fields('class_terms', 'late')) == ['generator']
  assert made(fields('class_terms', 'none')) == ['generator']
  assert made(fields('ideas', 'no_prototypes')) == ['warm-up', 'generator']
  assert made(fields('ideas', 'no_generator')) == ['generator', 'procedural']


def test_variants_are_configs_of_their_own():
  for variants in ablation.GROUPS.values():
    found = []
    for _, fields in variants.values():
      config = config_lib.default_config()
      config.update_from_flattened_dict(ablation.SHORT | fields)
      found.append(config_lib.resolve(config))
    assert len(set(found)) == len(found)
    assert len({label for label, _ in variants.values()}) == len(found)


def test_without_the_generator_the_pool_is_as_large():
  def size(fields):
    config = config_lib.default_config()
    config.update_from_flattened_dict(ablation.SHORT | fields)
    schedule = config_lib.resolve(config).schedule
    return schedule.pool_batches + schedule.procedural_batches

  assert size(ablation.GROUPS['ideas']['no_generator'][1]) == size({})
