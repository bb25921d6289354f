"""The phases of a run, in order, and what happens when each begins."""

from typing import NamedTuple

from clusterq_jax.config.fields import Schedule

# Signed-gradient steps that each procedural image takes.
PROCEDURAL_STEPS = 10


class Phase(NamedTuple):
  """A stretch of steps of one kind.

  Attributes:
    name: for users.
    start: number of steps before it.
    length: number of its steps.
    step: name of the method of `Steps` that is one step.
    on_enter: names of the methods of `Session` that run before its first step.
  """

  name: str
  start: int
  length: int
  step: str
  on_enter: tuple[str, ...]

  @property
  def end(self) -> int:
    """Number of steps after its last one."""
    return self.start + self.length


def phases(schedule: Schedule) -> tuple[Phase, ...]:
  """Returns the phases that have steps."""
  found: list[Phase] = []
  start = 0
  # Centroids need a warmed-up generator, the student needs images.
  waiting = {
    'initialize_centroids': ('generator', 'procedural', 'joint', 'student'),
    'calibrate_student': ('joint', 'student'),
  }
  for name, step, length in (
    ('warm-up', 'warmup_step', schedule.warmup_steps),
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
  """Returns the number of steps before the student's first one."""
  return next(
    phase.start
    for phase in phases(schedule)
    if phase.name in ('joint', 'student')
  )
