"""A run that starts from the generator of another one.

The generator never sees the student, so one serves every bit width, placement
and student recipe: what the other run spent on it is not spent again.
"""

import pathlib
from typing import Any

import jax
import ml_collections

from clusterq_jax import config as config_lib
from clusterq_jax.errors import InputError
from clusterq_jax.method.state import TrainState
from clusterq_jax.runtime import checkpoint, metrics
from clusterq_jax.runtime import session as experiment
from clusterq_jax.weights.teacher import Teacher

# Beginnings of fields that may differ: the generator does not depend on them.
STUDENT_FIELDS = (
  'quant.',
  'student.',
  'augment.',
  'checkpoint_every',
  'generator.workdir',
  'loss.student_cross_entropy',
  'loss.distillation',
  'loss.features',
  'schedule.student_steps',
  'schedule.range_steps',
)


def take_generator(
  config: ml_collections.ConfigDict,
  teacher: Teacher,
  key: jax.Array,
  state: TrainState,
) -> TrainState:
  """A new run's state with the generator's part of a finished run.

  Args:
    config: of the new run; `generator.workdir` names the other.
    teacher: of both.
    key: of initialisation; only shapes depend on it.
    state: the new run's, before its first step; replicated on its devices.

  Returns:
    The state at the new run's first student step: generator, centroids and
    pool are the other's.

  Raises:
    InputError: no finished run there, or its generator is of another kind.
  """
  folder = pathlib.Path(config.generator.workdir)
  stored, other = _stored_config(folder)
  changed = [
    difference
    for difference in config_lib.differences(stored, config)
    if not difference.startswith(STUDENT_FIELDS)
  ]
  if changed:
    raise InputError(
      f'config.generator.workdir={folder}: its generator is of another config; '
      f'it differs in {"; ".join(changed)}'
    )
  abstract = experiment.make_steps(other, teacher).abstract_state(
    key, teacher.variables
  )
  checkpoints = checkpoint.Checkpoints(str(folder / 'checkpoints'))
  restored = checkpoints.restore(abstract, say=print)
  done = config_lib.total_steps(other.schedule)
  if restored is None or int(restored[0].step) != done:
    raise InputError(
      f'config.generator.workdir={folder}: its run is not finished; expected '
      f'a checkpoint at step {done}'
    )
  source, _ = restored
  first = (
    config_lib.total_steps(config.schedule) - config.schedule.student_steps
  )
  return state.replace(
    step=jax.numpy.full_like(state.step, first),
    generator=source.generator,
    generator_opt=source.generator_opt,
    centroids=source.centroids,
    pool=source.pool,
  )


def _stored_config(
  folder: pathlib.Path,
) -> tuple[dict[str, Any], ml_collections.ConfigDict]:
  """What config.json holds, and the config it was written from."""
  config = config_lib.defaults()
  try:
    stored = metrics.read_json(folder / 'config.json')
    with config.unlocked():
      config.update(stored)
    config_lib.validate(config)
  except Exception as e:  # what is no config can raise anything
    raise InputError(
      f'config.generator.workdir={folder}: no run there ({e})'
    ) from e
  return stored, config
