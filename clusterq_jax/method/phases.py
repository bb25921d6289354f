"""The phases of a run, and the transitions before them."""

from typing import NamedTuple

from clusterq_jax.config.fields import Schedule

# Signed-gradient steps of each procedural image.
PROCEDURAL_STEPS = 5


class Phase(NamedTuple):
  """Consecutive steps of one kind.

  Attributes:
    name: name that users see.
    start: number of steps before the phase.
    length: number of steps in the phase.
    step: name of the method of `Steps` that makes one step.
    on_enter: names of the methods of `Session` that run before the phase.
  """

  name: str
  start: int
  length: int
  step: str
  on_enter: tuple[str, ...]

  @property
  def end(self) -> int:
    """Returns the number of steps of the run when the phase ends."""
    return self.start + self.length


def phases(schedule: Schedule) -> tuple[Phase, ...]:
  """Returns the phases that have steps, in order."""
  found: list[Phase] = []
  start = 0
  # Each transition runs once, before the first phase in its list. Centroids
  # need a warmed-up generator, and the student needs calibration images.
  waiting = {
    'initialize_centroids': ('generator', 'procedural', 'joint', 'student'),
    'calibrate_student': ('joint', 'student'),
  }
  for name, step, length in (
    ('warm-up', 'generator_step', schedule.warmup_steps),
    ('generator', 'generator_step', schedule.generator_steps),
    (
      'procedural',
      'procedural_step',
      schedule.procedural_batches * PROCEDURAL_STEPS,
    ),
    ('joint', 'joint_step', schedule.joint_steps),
    ('student', 'student_step', schedule.student_steps),
  ):
    if not length:
      continue
    on_enter = tuple(what for what, when in waiting.items() if name in when)
    for what in on_enter:
      del waiting[what]
    found.append(Phase(name, start, length, step, on_enter))
    start += length
  return tuple(found)


def total_steps(schedule: Schedule) -> int:
  """Returns the number of steps of a run."""
  return phases(schedule)[-1].end


def student_start(schedule: Schedule) -> int:
  """Returns the number of steps before the student's first update."""
  return next(
    phase.start
    for phase in phases(schedule)
    if phase.name in ('joint', 'student')
  )
