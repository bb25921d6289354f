"""The joint step of this project, on random weights."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax import tree_util

from benchmarks import random_weights
from benchmarks.step_time import setting
from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.method.state import TrainState
from clusterq_jax.runtime.session import Session


def _in_check(args, tree: Any) -> Any:
  """Returns a tree in float64 for --check; Flax makes float32 parameters."""
  return jax.tree.map(
    lambda a: np.float64(a) if args.check and a.dtype == np.float32 else a, tree
  )


def _session(args) -> Session:
  config = config_lib.paper_config()
  config.schedule.batch_size = args.batch_size
  config.generator.channels = setting.CHANNELS[args.generator]
  config.quant.ranges, config.student.optimizer = 'learned', 'adam'
  config.augment.probability = 0.0 if args.check else 1.0
  config.loss.noise = (0.0, 0.0) if args.check else setting.NOISE
  with jax.enable_x64(False):  # the weights' own pass mixes types under x64
    teacher = random_weights.teacher('resnet20', setting.CLASSES, args.seed)
  wide = dataclasses.replace(
    teacher, variables=_in_check(args, teacher.variables)
  )
  return Session(config_lib.resolve(config), wide)


def _state(session: Session, seed: int) -> TrainState:
  """Makes a train state with quantizers and centroids, none at its default."""
  rng = np.random.RandomState(seed)

  def log_step(path, s):
    step = {'weights': 0.02, 'output': 0.2}[path[-1].key]
    return np.full(s.shape, math.log(step), s.dtype)

  state = session.init()
  quant = tree_util.tree_map_with_path(log_step, state.student['quant'])
  centroids = jax.tree.map(
    lambda a: rng.uniform(0.2, 1.2, a.shape).astype(a.dtype), state.centroids
  ).replace(seen=np.ones(setting.CLASSES, bool))
  student = {**state.student, 'quant': quant}
  return state.replace(student=student, centroids=centroids)


def flatten(tree: Any) -> dict[str, np.ndarray]:
  """Returns arrays by path."""
  return {
    tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in tree_util.tree_leaves_with_path(tree)
  }


class JaxStep:
  """`joint_step` as a run has it: compiled once, with a donated state.

  Attributes:
    inputs: the teacher's variables and the first state, by path.
    state: the present one.
    compile_s: seconds that the compilation took.
  """

  def __init__(self, args):
    session = _session(args)
    teacher = session.teacher.variables
    state = _in_check(args, _state(session, args.seed))
    self.inputs = flatten({'teacher': teacher, 'state': state})
    self.state, *self._rest = jax.device_put(
      (state, teacher, jax.random.key(args.seed)),
      sharding.replicated(session.mesh),
    )
    self._run = session.compile(
      session.steps.joint_step, self.state, *self._rest, donate=True
    )
    self.compile_s = session.compile.seconds

  def __call__(self) -> dict[str, jax.Array]:
    """Makes a step; returns its losses."""
    self.state, terms = jax.block_until_ready(
      self._run(self.state, *self._rest)
    )
    return terms
