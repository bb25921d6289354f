"""Programs that are compiled in a thread."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clusterq_jax import sharding
from clusterq_jax.runtime.compiler import Compiler


@pytest.fixture
def compiler():
  with Compiler(sharding.make_mesh(1, jax.devices()[:1])) as made:
    yield made


def _double(x):
  return 2 * x


def test_the_caller_goes_on_while_a_program_compiles(compiler):
  traced, go_on = threading.Event(), threading.Event()

  def slow(x):
    traced.set()
    assert go_on.wait(60)
    return x + 1

  pending = compiler.start(slow, jnp.zeros(3))
  assert traced.wait(60)
  assert not pending.future.done()
  assert compiler.seconds == 0
  go_on.set()
  np.testing.assert_array_equal(compiler.wait(pending)(jnp.zeros(3)), 1)
  assert 0 < compiler.seconds < compiler.total_seconds


def test_an_argument_may_be_donated_before_its_turn(compiler):
  x = jnp.ones(3)
  pending = compiler.start(_double, x)
  x.delete()
  np.testing.assert_array_equal(compiler.wait(pending)(jnp.ones(3)), 2)


@pytest.mark.parametrize('wide', [False, True])
def test_the_callers_precision_holds_in_the_thread(compiler, wide):
  with jax.enable_x64(wide):
    program = compiler(lambda: jnp.zeros(()))
    assert program().dtype == (jnp.float64 if wide else jnp.float32)


def test_an_error_reaches_the_one_who_waits(compiler):
  pending = compiler.start(jnp.dot, jnp.zeros(2), jnp.zeros(3))
  with pytest.raises(TypeError):
    compiler.wait(pending)


def test_leaving_drops_what_has_not_begun(compiler):
  traced, go_on = threading.Event(), threading.Event()

  def slow(x):
    traced.set()
    assert go_on.wait(60)
    return x

  with compiler:
    compiler.start(slow, jnp.zeros(1))
    later = compiler.start(_double, jnp.zeros(1))
    assert traced.wait(60)
  assert later.future.cancelled()
  go_on.set()
