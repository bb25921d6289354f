"""The table of phases."""

import dataclasses

import pytest

from clusterq_jax.config.fields import Schedule
from clusterq_jax.method import phases

_NONE = Schedule(
  warmup_steps=0,
  generator_steps=0,
  joint_steps=0,
  student_steps=0,
  pool_batches=0,
  procedural_batches=0,
)


def _phases(**lengths):
  return phases.phases(dataclasses.replace(_NONE, **lengths))


def test_all_phases_follow_one_another():
  found = _phases(
    warmup_steps=2,
    generator_steps=3,
    procedural_batches=4,
    joint_steps=5,
    student_steps=6,
  )
  assert [(p.name, p.start, p.length) for p in found] == [
    ('warm-up', 0, 2),
    ('generator', 2, 3),
    ('procedural', 5, 4 * phases.PROCEDURAL_STEPS),
    ('joint', 25, 5),
    ('student', 30, 6),
  ]
  assert [p.end for p in found] == [2, 5, 25, 30, 36]
  assert [p.on_enter for p in found] == [
    (),
    ('initialize_centroids',),
    (),
    ('calibrate_student',),
    (),
  ]


@pytest.mark.parametrize(
  ('lengths', 'names', 'on_enter'),
  [
    # The paper's phases.
    (
      {'warmup_steps': 2, 'joint_steps': 3},
      ['warm-up', 'joint'],
      [(), ('initialize_centroids', 'calibrate_student')],
    ),
    # The recipe's phases.
    (
      {'warmup_steps': 2, 'generator_steps': 1, 'student_steps': 3},
      ['warm-up', 'generator', 'student'],
      [(), ('initialize_centroids',), ('calibrate_student',)],
    ),
    (
      {'student_steps': 3},
      ['student'],
      [('initialize_centroids', 'calibrate_student')],
    ),
  ],
)
def test_phases_without_steps_are_left_out(lengths, names, on_enter):
  found = _phases(**lengths)
  assert [p.name for p in found] == names
  assert [p.on_enter for p in found] == on_enter


def test_where_the_student_begins():
  s = dataclasses.replace(_NONE, warmup_steps=2, joint_steps=3, student_steps=4)
  assert phases.student_start(s) == 2
  assert phases.total_steps(s) == 9
