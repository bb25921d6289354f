"""Tests that every shipped config runs a step of each phase."""

import dataclasses
import json
import pathlib
import runpy

import jax
import pytest

from benchmarks import random_weights
from clusterq_jax import config as config_lib
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime.session import Session
from tests.reference import FastCompiler

_FOLDER = pathlib.Path(__file__).parents[2] / 'configs'
_FILES = sorted([*_FOLDER.glob('*.py'), *_FOLDER.glob('paper/*.py')])
# Configs that differ from another only in their network, which is deeper: its
# steps take minutes to compile.
_LIKE = {
  'resnet50': 'resnet18',
  'mobilenet_v2': 'efficientnet_lite0',
  'paper/resnet50': 'paper/resnet18',
  'paper/mobilenet_v2': 'paper/resnet18',
}
# Losses of configs/paper/cifar10_resnet20.py at commit 175d841, shrunk as in
# `test_the_paper_computes_the_losses_of_the_first_edition`.
_PAPER = json.loads("""[
{"generator/inception": 10.93884, "generator/loss": 11.1913,
 "generator/statistics": 2.524634},
{"generator/inception": 11.7228, "generator/loss": 11.93619,
 "generator/statistics": 2.133895},
{"generator/diversity": 1.426258, "generator/inception": 10.69185,
 "generator/loss": 11.90935, "generator/sfda": 0.1791076,
 "generator/statistics": 2.005512, "student/cross_entropy": 9.742893,
 "student/distillation": 0.08836202, "student/loss": 9.831255},
{"generator/diversity": 1.54225, "generator/inception": 10.15732,
 "generator/loss": 11.52716, "generator/sfda": 0.3301513,
 "generator/statistics": 1.473468, "student/cross_entropy": 6.83584,
 "student/distillation": 0.2213258, "student/loss": 7.057166}
]""")


def _name(path):
  return str(path.relative_to(_FOLDER).with_suffix(''))


def _shrunk(path):
  """Returns the config with one step in each of its phases."""
  config = runpy.run_path(str(path))['get_config']()
  # Which phases there are does not depend on the network.
  s = config_lib.complete(config_lib.resolve(config), (32, 32), 10).schedule
  for name in ('warmup_steps', 'generator_steps', 'joint_steps'):
    config.schedule[name] = min(1, getattr(s, name))
  config.schedule.student_steps = min(1, s.student_steps)
  config.schedule.pool_batches = min(1, s.pool_batches)
  config.schedule.procedural_batches = min(1, s.procedural_batches)
  config.schedule.batch_size = 2
  config.centroids.images_per_class = 1
  return config


def _session(config):
  """Returns the session of the config, with random weights."""
  resolved = config_lib.resolve(config)
  arch = resolved.teacher.arch or 'resnet20'
  classes = resolved.teacher.num_classes or 10
  if resolved.teacher.weights == 'embedded':
    return Session(resolved)
  teacher = random_weights.teacher(arch, classes)
  small = dataclasses.replace(
    teacher.preprocessing,
    image_size=tuple(min(n, 64) for n in teacher.preprocessing.image_size),
  )
  return Session(resolved, dataclasses.replace(teacher, preprocessing=small))


@pytest.mark.slow
@pytest.mark.parametrize(
  'path',
  [
    pytest.param(p, marks=pytest.mark.full if _name(p) in _LIKE else ())
    for p in _FILES
  ],
  ids=_name,
)
def test_every_phase_can_be_traced(path):
  session = _session(_shrunk(path))
  state = jax.eval_shape(
    session.steps.init, jax.random.key(0), session.variables
  )
  args = session.step_arguments
  for phase in session.phases:
    step = getattr(session.steps, phase.step)
    state, metrics = jax.eval_shape(step, state, *args)
    assert metrics


@pytest.mark.parametrize(('name', 'other'), _LIKE.items())
def test_configs_that_differ_in_their_network(name, other):
  own, others = (
    runpy.run_path(str(_FOLDER / f'{n}.py'))['get_config']()
    for n in (name, other)
  )
  for config in (own, others):
    config.teacher.arch = config.teacher.weights = ''
  assert own.to_dict() == others.to_dict()


@pytest.mark.full
@pytest.mark.parametrize(
  'path', [p for p in _FILES if _name(p) not in _LIKE], ids=_name
)
def test_a_step_of_every_phase(path, monkeypatch):
  monkeypatch.setattr(session_lib, 'Compiler', FastCompiler)
  session = _session(_shrunk(path))
  state = session.init()
  for phase in session.phases:
    program = session.program(phase)
    state = session.enter(phase, state)
    for _ in range(min(phase.length, 1)):
      state, metrics = program(state, *session.step_arguments)
    assert all(abs(float(value)) < 1e6 for value in metrics.values())
  assert int(state.bad_step) == -1
  assert int(state.step) == len(session.phases)


@pytest.mark.slow
def test_the_paper_computes_the_losses_of_the_first_edition():
  path = _FOLDER / 'paper' / 'cifar10_resnet20.py'
  config = runpy.run_path(str(path))['get_config']()
  config.teacher.weights = 'embedded'
  for field in ('image_size', 'mean', 'std'):
    config.teacher[field] = None
  config.schedule.batch_size = 16
  config.schedule.warmup_steps = 2
  config.schedule.joint_steps = 2
  config.centroids.images_per_class = 4
  session = Session(config_lib.resolve(config))
  state, found = session.init(), []
  for phase in session.phases:
    program = session.program(phase)
    state = session.enter(phase, state)
    for _ in range(phase.length):
      state, metrics = program(state, *session.step_arguments)
      found.append({name: float(value) for name, value in metrics.items()})
  for step, (expected, metrics) in enumerate(zip(_PAPER, found, strict=True)):
    for name, value in expected.items():
      # Rounding differences of early steps grow in later steps. After its first
      # update, a few codes of the student differ between CPUs: on one with AMX,
      # the first edition and this one find a divergence of 0.2437.
      updated = step == 3 and name.startswith('student/')
      close = pytest.approx(value, rel=0.12 if updated else 2e-2)
      assert metrics[name] == close, name
  for name, value in _PAPER[0].items():
    assert found[0][name] == pytest.approx(value, rel=1e-4), name
