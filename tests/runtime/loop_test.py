"""Tests calls that make several steps: lines, files, programs, stops."""

import contextlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax.method.phases import Phase
from clusterq_jax.modes import quantize
from clusterq_jax.runtime import loop, preemption
from clusterq_jax.runtime.compiler import Compiler

_LOG, _CHECKPOINT = 5, 4


@pytest.mark.parametrize(
  ('most', 'traced', 'expected'),
  [
    (10, range(0), [10, 10, 5, 10, 5, 10, 10, 10]),
    (25, range(0), [25, 15, 10, 20]),
    (1, range(0), [1] * 70),
    (10, range(3, 7), [3, 4, 10, 8, 10, 5, 10, 10, 10]),
  ],
)
def test_what_a_call_ends_at(most, traced, expected):
  """A line every 25 steps, a checkpoint every 40, the phase's end at 70."""
  session = types.SimpleNamespace(
    steps_per_call=most,
    config=types.SimpleNamespace(
      report=types.SimpleNamespace(log_every=25), checkpoint_every=40
    ),
  )
  phase, done, found = Phase('joint', 0, 70, 'joint_step', ()), 0, []
  while done < phase.end:
    found.append(loop._count(session, phase, done, traced))
    done += found[-1]
  assert found == expected


@pytest.fixture
def several(tiny_config):
  """Returns the tiny config with three steps in a call."""
  tiny_config.steps_per_call = 3
  tiny_config.report.log_every = _LOG
  tiny_config.checkpoint_every = _CHECKPOINT
  return tiny_config


def _lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def _stop_after(calls):
  """Returns a `notice` whose function says once to stop."""

  @contextlib.contextmanager
  def notice():
    said = iter([False] * (calls - 1) + [True])
    yield lambda: next(said)

  return notice


@pytest.mark.slow
def test_a_run_with_several_steps_in_a_call(
  several, finished, tmp_path, monkeypatch
):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  quantize.quantize(several, str(whole))
  # The same lines as with one step in a call, up to rounding.
  expected = _lines(finished.workdir)[_LOG - 1 :: _LOG]
  for own, other in zip(_lines(whole), expected, strict=True):
    assert own == pytest.approx(other, rel=1e-5)

  # Stops in the middle of the generator's phase, after calls of 2 and 2 steps.
  with monkeypatch.context() as patch:
    patch.setattr(preemption, 'notice', _stop_after(2))
    with pytest.raises(preemption.Preempted, match='after step 4 of 10'):
      quantize.quantize(several, str(parts))
  assert not (parts / 'student.safetensors').exists()
  several.steps_per_call = 2  # other calls, the same steps
  quantize.quantize(several, str(parts))
  for name in ('student.safetensors', 'metrics.jsonl', 'samples.png'):
    assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize('name', ['joint_step', 'student_step'])
def test_a_call_makes_its_steps(finished, state_at, name):
  """One step equals the single program's; three are three times one."""
  arguments = finished.variables, finished.key
  program = Compiler(finished.session.mesh)(
    finished.steps.repeated(getattr(finished.steps, name)),
    state_at(8),
    *arguments,
    np.int32(1),
  )

  def call(state, count):
    return program(state, *arguments, np.int32(count))

  state = state_at(8)
  expected, metrics = finished.programs[name](state_at(8), *arguments)
  found, values = call(state, 1)
  values, metrics = jax.tree.map(float, (values, metrics))
  assert values == pytest.approx(metrics, rel=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found,
    expected,
  )
  together = call(state, 3)
  for _ in range(3):
    state, values = call(state, 1)
  jax.tree.map(np.testing.assert_array_equal, together, (state, values))
  assert int(state.step) == 11
  assert int(state.bad_step) == -1


@pytest.mark.slow
def test_the_first_bad_step_of_a_call(finished, state_at):
  step = finished.steps.repeated(finished.steps.generator_step)
  arguments = finished.variables, finished.key
  state = state_at(8)
  poisoned = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.generator)
  state = state.replace(generator=poisoned)
  program = Compiler(finished.session.mesh)(
    step, state, *arguments, np.int32(1)
  )
  state, _ = program(state, *arguments, np.int32(3))
  assert int(state.bad_step) == 8
