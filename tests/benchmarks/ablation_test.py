"""The ablation benchmark: what variants of one seed share, and its table."""

import types

import jax.numpy as jnp
import numpy as np

from benchmarks import ablation
from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.method.centroids import empty
from clusterq_jax.method.state import TrainState


class _Bench:
  """A bench of steps that only note that they were made, and count."""

  def __init__(self, variant):
    self.config = config_lib.fast()
    self.config.schedule.procedural_batches = variant.get(
      'schedule.procedural_batches', 2
    )
    schedule = self.config.schedule
    schedule.pool_batches, schedule.student_steps = 1, 5
    self.steps = types.SimpleNamespace(
      mesh=sharding.make_mesh(1),
      batch_size=1,
      pool_batches=1,
      procedural_batches=schedule.procedural_batches,
      procedural_start=schedule.warmup_steps + schedule.generator_steps,
    )
    self.made: list[str] = []
    number = jnp.zeros((), jnp.int32)
    self.state = TrainState(
      step=number,
      generator=number,
      generator_opt=number,
      student=number,
      student_opt=number,
      centroids=empty(1, [1]),
      pool=jnp.zeros((1 + schedule.procedural_batches, 1), jnp.uint8),
      bad_step=number - 1,
    )

  def _make(self, name, **fields):
    self.made.append(name)
    self.state = self.state.replace(**fields)

  def warm_up(self):
    self._make('warm-up', generator=self.state.generator + 1)

  def train_generator(self):
    state = self.state
    pool = state.pool.at[:1].set(7)
    self._make('generator', generator=state.generator + 10, pool=pool)

  def make_procedural(self):
    assert int(self.state.step) == self.steps.procedural_start
    self._make('procedural', pool=self.state.pool.at[1:].set(9))

  def calibrate(self):
    self.made.append('calibrated')


def test_variants_share_what_they_do_not_change():
  stages = ablation.Stages()

  def made(variant):
    bench = _Bench(variant)
    stages.bring(bench, variant)
    assert int(bench.state.generator) == 11
    count = bench.steps.procedural_batches
    assert np.ravel(bench.state.pool).tolist() == [7] + count * [9]
    schedule = bench.config.schedule
    first = config_lib.total_steps(schedule) - schedule.student_steps
    assert int(bench.state.step) == first
    assert bench.made.pop() == 'calibrated'
    return bench.made

  groups = ablation.GROUPS
  assert made({}) == ['warm-up', 'generator', 'procedural']
  assert made({'quant.weight_bits': 3}) == []
  assert made(groups['ideas']['no_features']) == []
  assert made(groups['ideas']['no_procedural']) == []
  assert made(groups['class_terms']['late']) == ['generator']
  assert made(groups['class_terms']['none']) == ['generator']
  assert made(groups['ideas']['no_prototypes']) == ['warm-up', 'generator']
  everything = ['warm-up', 'generator', 'procedural']
  assert made(groups['ideas']['no_generator']) == everything


def test_variants_are_configs_of_their_own():
  for variants in ablation.GROUPS.values():
    for variant in variants.values():
      config = config_lib.fast()
      config.update_from_flattened_dict(ablation.SHORT | variant)
      config_lib.validate(config)
    texts = [str(sorted(variant.items())) for variant in variants.values()]
    assert len(set(texts)) == len(texts)


def test_table():
  records = [
    {
      'variant': variant,
      'bits': bits,
      'seed': seed,
      'every': 30,
      'drops': [9, 2, drop],
      'divergences': [0.9, 0.2, drop / 10],
    }
    for variant, seed, drop in (
      ('none', 0, 1.25),
      ('none', 1, 1.0),
      ('late', 1, 1.5),
    )
    for bits in ablation.BITS
  ]
  names = ['none', 'late']
  *_, none, late = ablation.table(records, names)
  figures = '1.12 (1.25, 1.00) | 0.1125 (0.1250, 0.1000)'
  assert none == f'| `none` | {figures} | {figures} |'
  figures = '1.50 (1.50) | 0.1500 (0.1500)'
  assert late == f'| `late` | {figures} | {figures} |'
