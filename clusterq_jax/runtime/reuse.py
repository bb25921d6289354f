"""Starts a run from the generator of another run.

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

# The generator does not depend on fields with these prefixes.
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
  """Copies the generator, the centroids and the pool of a finished run.

  Args:
    session: session of the new run; `config.generator.workdir` names the
      finished run.
    state: state of the new run before its first step.

  Returns:
    The state of the new run before its first student step.

  Raises:
    InputError: the folder holds no finished run, or the generator of that run
      has another config.
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
      f'config.generator.workdir={folder}: its generator has another config, '
      f'which differs in {"; ".join(changed)}'
    )
  abstract = Session(other, session.teacher).abstract_state()
  checkpoints = checkpoint.Checkpoints(str(folder / 'checkpoints'))
  restored = checkpoints.restore(abstract, say=print)
  done = phases.total_steps(other.schedule)
  if restored is None or int(restored[0].step) != done:
    raise InputError(
      f'config.generator.workdir={folder}: the run is not finished; expected '
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
  """Returns the config that is stored in a workdir."""
  try:
    stored = metrics.read_json(folder / 'config.json')
    return config_lib.from_json(stored, str(folder))
  except (OSError, InputError) as e:
    raise InputError(
      f'config.generator.workdir={folder}: found no run; expected a finished '
      f'run ({e})'
    ) from e
