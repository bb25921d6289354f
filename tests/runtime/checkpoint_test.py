"""Tests checkpoints that are written while the next steps run."""

import functools

import jax
import jax.numpy as jnp

from clusterq_jax import sharding
from clusterq_jax.runtime.checkpoint import Checkpoints


@functools.partial(jax.jit, donate_argnums=0)
def _step(state):
  return jax.tree.map(lambda a: a + 1, state)


def test_a_saved_state_may_be_donated(tmp_path):
  everywhere = sharding.replicated(sharding.make_mesh(1))
  state = jax.device_put({'x': jnp.zeros(1_000_000)}, everywhere)
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
  )
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(0, state, 0.5)
    for _ in range(3):
      state = _step(state)
    jax.block_until_ready(state)
  restored, wall_s = Checkpoints(str(tmp_path)).restore(abstract, print)
  assert wall_s == 0.5
  assert not restored['x'].any()
  assert (state['x'] == 3).all()
