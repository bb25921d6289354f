"""Optimisers of the generator and the student, with their learning rates."""

import optax

from clusterq_jax.config.fields import Config
from clusterq_jax.method import phases

# Usual betas of Adam for GAN generators (Radford et al., arXiv 1511.06434).
_GENERATOR_BETAS = (0.5, 0.999)
# The paper's SGD (arXiv 2205.00179, section IV-A), with Nesterov momentum.
_MOMENTUM, _WEIGHT_DECAY = 0.9, 1e-4
# The paper multiplies learning rates by the factor at these steps of the run.
_BOUNDARIES, _FACTOR = (20_000, 40_000, 60_000), 0.1


def _learning_rate(
  base: float, decay: str, updates: int, first: int
) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates.

  Args:
    base: learning rate before any decay.
    decay: 'cosine' over all updates, or 'step' as in the paper.
    updates: number of updates in the run.
    first: number of steps of the run before the first update.
  """
  if decay == 'cosine':
    return optax.cosine_decay_schedule(base, max(updates, 1))
  by_step = optax.piecewise_constant_schedule(
    base, dict.fromkeys(_BOUNDARIES, _FACTOR)
  )
  return lambda count: by_step(count + first)


def for_generator(config: Config) -> optax.GradientTransformation:
  """Returns the optimiser of the generator's parameters, Adam."""
  s = config.schedule
  updates = s.warmup_steps + s.generator_steps + s.joint_steps
  rate = _learning_rate(config.generator.lr, s.lr_decay, updates, first=0)
  return optax.chain(
    optax.scale_by_adam(*_GENERATOR_BETAS), optax.scale_by_learning_rate(rate)
  )


def for_student(config: Config) -> optax.GradientTransformation:
  """Returns the optimiser of the student.

  The parameters and the steps of quantizers have separate learning rates.

  Args:
    config: configuration with the schedule and the learning rates.

  Returns:
    The optimiser of trees {'params', 'quant'} or {'params'}.
  """
  s, student = config.schedule, config.student
  updates, first = s.joint_steps + s.student_steps, phases.student_start(s)

  def part(base: float, decayed: bool) -> optax.GradientTransformation:
    rate = _learning_rate(base, s.lr_decay, updates, first)
    if student.optimizer == 'adam':
      rules = [optax.scale_by_adam()]
    else:
      rules = [optax.trace(_MOMENTUM, nesterov=True)]
      if decayed:
        rules.insert(0, optax.add_decayed_weights(_WEIGHT_DECAY))
    return optax.chain(*rules, optax.scale_by_learning_rate(rate))

  # Weight decay would pull the logarithms of steps to 0, so steps of quantizers
  # are not decayed.
  parts = {
    'params': part(student.lr, decayed=True),
    'quant': part(student.quant_lr, decayed=False),
  }
  return optax.partition(parts, lambda tree: {key: key for key in tree})
