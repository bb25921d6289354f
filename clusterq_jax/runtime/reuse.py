"""A run that starts from the generator of another one.

The generator never sees the student, so one generator serves every bit width,
placement and student recipe.
"""

import pathlib

import jax

from clusterq_jax import config as config_lib
from clusterq_jax.config import Config
from clusterq_jax.errors import InputError
from clusterq_jax.method import phases
from clusterq_jax.method.state import TrainState
from clusterq_jax.runtime import checkpoint, metrics
from clusterq_jax.runtime.session import Session

# The generator does not depend on fields that begin like this.
STUDENT_FIELDS = (
  'quant.',
  'student.',
  'augment.',
  'budget',
  'checkpoint_every',
  'generator.workdir',
  'loss.student_cross_entropy',
  'loss.features',
  'schedule.student_steps',
)


def take_generator(session: Session, state: TrainState) -> TrainState:
  """Takes the generator's part of a finished run.

  Args:
    session: of the new run; its `generator.workdir` names the other.
    state: the new run's, before its first step.

  Returns:
    The state at the new run's first student step: generator, centroids and
    pool are the other's.

  Raises:
    InputError: no finished run there, or its generator is of another kind.
  """
  folder = pathlib.Path(session.config.generator.workdir)
  other = _stored_config(folder)
  changed = [
    difference
    for difference in config_lib.differences(
      config_lib.to_json(other), session.config
    )
    if not difference.startswith(STUDENT_FIELDS)
  ]
  if changed:
    raise InputError(
      f'config.generator.workdir={folder}: its generator is of another config; '
      f'it differs in {"; ".join(changed)}'
    )
  abstract = Session(other, session.teacher).abstract_state()
  checkpoints = checkpoint.Checkpoints(str(folder / 'checkpoints'))
  restored = checkpoints.restore(abstract, say=print)
  done = phases.total_steps(other.schedule)
  if restored is None or int(restored[0].step) != done:
    raise InputError(
      f'config.generator.workdir={folder}: its run is not finished; expected '
      f'a checkpoint at step {done}'
    )
  source, _ = restored
  first = phases.student_start(session.config.schedule)
  return state.replace(
    step=jax.numpy.full_like(state.step, first),
    generator=source.generator,
    generator_opt=source.generator_opt,
    centroids=source.centroids,
    pool=source.pool,
  )


def _stored_config(folder: pathlib.Path) -> Config:
  """Returns the config that a workdir holds."""
  try:
    stored = metrics.read_json(folder / 'config.json')
    return config_lib.from_json(stored, str(folder))
  except (OSError, InputError) as e:
    raise InputError(
      f'config.generator.workdir={folder}: no run there ({e})'
    ) from e
