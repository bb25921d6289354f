"""The joint and the student step of this project, on random weights."""

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
from clusterq_jax.quant import numerics
from clusterq_jax.quant.plan import Plan
from clusterq_jax.runtime.session import Session


def _in_check(args, tree: Any) -> Any:
  """Returns a tree in float64 for --check; Flax makes float32 parameters."""
  return jax.tree.map(
    lambda a: np.float64(a) if args.check and a.dtype == np.float32 else a, tree
  )


def _config(args):
  """Returns the short recipe for the student step, the paper's for the other.

  The joint step has learned ranges and Adam, too, and augments every batch.
  """
  if args.step == 'student':
    config = config_lib.default_config()
  else:
    config = config_lib.paper_config()
    config.generator.channels = setting.CHANNELS[args.generator]
    config.quant.ranges, config.student.optimizer = 'learned', 'adam'
    config.augment.probability = 0.0 if args.check else 1.0
    config.loss.noise = (0.0, 0.0) if args.check else setting.NOISE
  config.schedule.batch_size = args.batch_size[0]
  return config_lib.resolve(config)


def _session(args) -> Session:
  with jax.enable_x64(False):  # the weights' own pass mixes types under x64
    teacher = random_weights.teacher('resnet20', setting.CLASSES, args.seed)
  wide = dataclasses.replace(
    teacher, variables=_in_check(args, teacher.variables)
  )
  return Session(_config(args), wide)


def _state(session: Session, seed: int) -> TrainState:
  """Makes a train state with quantizers, centroids and pool, none default."""
  rng = np.random.RandomState(seed)

  def log_step(path, s):
    # Equal steps would put values between two codes, or at the ends of a range,
    # where the last bit decides.
    step = {'weights': 0.02, 'output': 0.2}[path[-1].key]
    return (math.log(step) + rng.uniform(-0.1, 0.1, s.shape)).astype(s.dtype)

  state = session.init()
  quant = tree_util.tree_map_with_path(log_step, state.student['quant'])
  centroids = jax.tree.map(
    lambda a: rng.uniform(0.2, 1.2, a.shape).astype(a.dtype), state.centroids
  ).replace(seen=np.ones(setting.CLASSES, bool))
  pool, moved = state.pool, state.moved
  if pool is not None:
    pool = rng.randint(0, 256, pool.shape, np.uint8)
  if moved is not None:
    moved = rng.randn(*moved.shape).astype(moved.dtype)
  student = {**state.student, 'quant': quant}
  return state.replace(
    student=student, centroids=centroids, pool=pool, moved=moved
  )


def _codes(plan: Plan) -> dict[str, Any]:
  """Returns smallest and largest code of every quantizer, by its path."""
  codes = {
    f'{name}/weights': numerics.weight_range(bits)
    for name, bits in plan.weights
  }
  # No quantizer of this network has a zero point; `codes` would fail on one.
  codes |= {f'{name}/output': output.codes() for name, output in plan.outputs}
  return {name: np.asarray(pair) for name, pair in codes.items()}


def _constants(session: Session) -> dict[str, Any]:
  """Returns the numbers of config, plan and preprocessing that torch needs."""
  config, networks = session.config, session.steps.networks
  return {
    'codes': _codes(networks.plan),
    'input_step': np.float32(networks.plan.output('input').step),
    'mean': np.asarray(networks.preprocessing.mean),
    'std': np.asarray(networks.preprocessing.std),
    'rate': {
      'params': np.asarray(config.student.lr),
      'quant': np.asarray(config.student.quant_lr),
    },
    'mixup': np.asarray(config.augment.mixup),
    'adversarial': np.asarray(config.augment.adversarial),
    'features': np.asarray(config.loss.features),
  }


def flatten(tree: Any) -> dict[str, np.ndarray]:
  """Returns arrays by path."""
  return {
    tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in tree_util.tree_leaves_with_path(tree)
  }


class JaxStep:
  """A step as a run has it: compiled once, with a donated state.

  Attributes:
    session: session of the step.
    inputs: the teacher's variables, the first state and constants, by path.
    state: the present one.
    compile_s: seconds that the compilation took.
  """

  def __init__(self, args):
    self.session = session = _session(args)
    teacher = session.teacher.variables
    state = _in_check(args, _state(session, args.seed))
    self.inputs = flatten(
      {'teacher': teacher, 'state': state, 'constants': _constants(session)}
    )
    self._key = jax.random.key(args.seed)
    self.state, *self._rest = jax.device_put(
      (state, teacher, self._key), sharding.replicated(session.mesh)
    )
    self._name = args.step
    step = getattr(session.steps, f'{args.step}_step')
    self._run = session.compile(step, self.state, *self._rest, donate=True)
    self.compile_s = session.compile.seconds

  def __call__(self) -> dict[str, jax.Array]:
    """Makes a step; returns its losses."""
    self.state, terms = jax.block_until_ready(
      self._run(self.state, *self._rest)
    )
    return terms

  def draws(self) -> tuple[np.ndarray, ...]:
    """Returns the random numbers of the step with number 0.

    Returns:
      Of the joint step: noise [B, L] and labels [B]. Of the student step, with
      N new and M moved images: rows [N] of the pool, ratios [N, 1, 1, 1] of
      mixup, and sizes [M, 1, 1, 1] of the moves in normalised pixel units.
    """
    config = self.session.config
    key, batch = jax.random.fold_in(self._key, 0), config.schedule.batch_size
    if self._name == 'joint':
      z_key, label_key = jax.random.split(jax.random.split(key, 3)[0])
      drawn = (
        jax.random.normal(z_key, (batch, setting.LATENT)),
        jax.random.randint(label_key, (batch,), 0, setting.CLASSES),
      )
    else:
      row_key, _, mix_key, size_key = jax.random.split(key, 4)
      on_key, ratio_key = jax.random.split(mix_key)
      moved = len(self.state.moved)
      shape = batch - moved, 1, 1, 1
      on = jax.random.bernoulli(on_key, config.augment.mixup, shape)
      size = jax.random.uniform(size_key, (moved, 1, 1, 1))
      drawn = (
        jax.random.randint(row_key, shape[:1], 0, len(self.state.pool)),
        jax.numpy.where(on, jax.random.uniform(ratio_key, shape), 0.0),
        config.augment.adversarial * size,
      )
    return tuple(map(np.asarray, drawn))
