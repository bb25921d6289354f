"""Ablations: the student's drop, with one part of the recipe changed.

    python -m benchmarks.ablation class_terms [--seeds 0 1 2]
    python -m benchmarks.ablation ideas [--seeds 0 1 2]
    python -m benchmarks.ablation many_classes [--seeds 0 1 2]

The groups use CIFAR-10, and `many_classes` uses CIFAR-100. The recipe is a
quarter as long. Each variant's generator serves a student at W4A4 and one at
W3A3, which the script evaluates along the way. A line for each student goes to
records/ablation.jsonl beside this file. Runs that have a line are not repeated.
`python -m benchmarks.results` makes tables and charts.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, records, time_to_accuracy
from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.runtime import reuse
from clusterq_jax.runtime import session as session_lib

RECORDS = records.FOLDER / 'ablation.jsonl'
BITS = {'W4A4': 4, 'W3A3': 3}
EVERY = 30  # student steps per evaluation
# As in the records. Adversarial images came later; whole runs measure them.
SHORT = {
  'budget': 1 / 4,
  'augment.adversarial': 0.0,
}
# Its label in tables and charts, and the fields in which it differs.
Variant = tuple[str, dict[str, Any]]


def _images() -> int:
  """Returns the number of batches in the pool of the short recipe."""
  config = config_lib.default_config()
  config.update_from_flattened_dict(SHORT)
  schedule = config_lib.resolve(config).schedule
  return schedule.pool_batches + schedule.procedural_batches


_LOSS = config_lib.default_config().loss
# By group. Tables and charts compare each variant with the first of its group.
GROUPS: dict[str, dict[str, Variant]] = {
  'class_terms': {
    'none': (
      'no class terms (a2 = a3 = 0)',
      {'loss.sfda': 0.0, 'loss.diversity': 0.0},
    ),
    'recipe': ('class terms of the recipe', {}),
    # The paper's table IV, and `sfda_raised`, which `no_diversity` must be
    # compared with: diversity is SFDA with noise on its target, so without it
    # the total weight of SFDA is smaller.
    'no_diversity': ('without the diversity loss', {'loss.diversity': 0.0}),
    'no_ema': ('without EMA of the centroids', {'centroids.decay': 0.0}),
    'neither': (
      'without both',
      {'loss.diversity': 0.0, 'centroids.decay': 0.0},
    ),
    'sfda_raised': (
      'a2 raised by a3, no diversity loss',
      {'loss.sfda': _LOSS.sfda + _LOSS.diversity, 'loss.diversity': 0.0},
    ),
    # Summed over ten classes, the terms weigh ten times as much. That is about
    # the weight of the statistics loss.
    'summed': ('summed over classes (eq. 4)', {'loss.class_reduction': 'sum'}),
    'late': ('in the last stage alone', {'centroids.first_layer': 13}),
    'everywhere': ('in all layers', {'centroids.first_layer': 0}),
    'paper_noise': (
      "with the paper's noise on the centroids",
      {'loss.noise': (0.5, 1.0)},
    ),
  },
  'ideas': {
    'recipe': ('recipe of that time', {}),
    'minmax_ranges': (
      'largest-magnitude ranges, plain rounding',
      {'quant.ranges': 'minmax'},
    ),
    'no_features': ('without distillation of features', {'loss.features': 0.0}),
    'no_procedural': (
      'without procedural images',
      {'schedule.procedural_batches': 0},
    ),
    # As many images. The untrained generator makes one batch of them, because
    # a config without any is refused.
    'no_generator': (
      'procedural images alone, as many',
      {
        'schedule.warmup_steps': 0,
        'schedule.generator_steps': 1,
        'schedule.pool_batches': 1,
        'schedule.procedural_batches': _images() - 1,
      },
    ),
    'no_headroom': ('without headroom', {'quant.headroom': 0.0}),
    'unconditional': (
      "generator's BatchNorm without classes",
      {'generator.conditional': False},
    ),
    'no_prototypes': (
      'without prototypes of classes',
      {'generator.prototypes': 0},
    ),
    'no_mixup': ('without blended images (mixup)', {'augment.mixup': 0.0}),
    'cross_entropy': (
      'with cross-entropy',
      {'loss.student_cross_entropy': 1.0},
    ),
  },
}
# Those that show nothing on CIFAR-10, with ten times the classes.
_MANY = 'recipe no_headroom unconditional no_prototypes no_mixup cross_entropy'
GROUPS['many_classes'] = {name: GROUPS['ideas'][name] for name in _MANY.split()}
CONFIGS = dict.fromkeys(GROUPS, 'cifar10_resnet20_fast') | {
  'many_classes': 'cifar100_variant'
}
_NOT_GENERATOR = (*reuse.STUDENT_FIELDS, 'schedule.procedural_batches')
# By phase: beginnings of the fields that it does not depend on.
_FREE = {
  'warm-up': (
    *_NOT_GENERATOR,
    'loss.sfda',
    'loss.diversity',
    'loss.noise',
    'loss.class_reduction',
    'centroids.',
  ),
  'generator': _NOT_GENERATOR,
  'procedural': (*reuse.STUDENT_FIELDS, 'loss.', 'centroids.', 'generator.'),
}
_GENERATOR_PARTS = ('generator', 'generator_opt', 'centroids')


class Stages:
  """Phases that variants of one seed share: run once, kept on the host."""

  def __init__(self):
    self._kept: dict[tuple, dict[str, Any]] = {}

  def bring(self, bench: time_to_accuracy.Bench, fields: dict) -> None:
    """Brings a new bench to its first student step.

    Args:
      bench: before its first step.
      fields: of the variant.
    """
    session = bench.session
    schedule = session.config.schedule
    drawn = schedule.pool_batches * schedule.batch_size
    *before, last = session.phases
    for phase in before:
      given = (
        f for f in fields.items() if not f[0].startswith(_FREE[phase.name])
      )
      key = (phase.name, *sorted(given))
      procedural = phase.name == 'procedural'
      rows = slice(drawn, None) if procedural else slice(drawn)
      if key not in self._kept:
        bench.run(phase)
        parts = () if procedural else _GENERATOR_PARTS
        made = {part: getattr(bench.state, part) for part in parts}
        self._kept[key] = jax.device_get(
          {**made, 'pool': bench.state.pool[rows]}
        )
      made = dict(self._kept[key])
      pool = np.array(bench.state.pool)
      pool[rows] = made.pop('pool')
      step = jnp.full_like(bench.state.step, phase.end)
      bench.state = jax.device_put(
        bench.state.replace(**made, pool=pool, step=step),
        sharding.replicated(session.mesh),
      )
    bench.enter(last)


def measure(base: str, name: str, variant: Variant, seed: int, stages: Stages):
  """Yields a record for each bit width.

  Args:
    base: config that the variant changes.
    name: of the variant.
    variant: what it changes.
    seed: of the run.
    stages: what variants of this seed share.
  """
  _, fields = variant
  for label, bits in BITS.items():
    own = {'quant.weight_bits': bits, 'quant.activation_bits': bits}
    config = time_to_accuracy.read_config(base, seed, SHORT | fields | own)
    images = session_lib.load_images(config, session_lib.load_teacher(config))
    bench = time_to_accuracy.Bench(config, images)
    stages.bring(bench, fields)
    course = bench.train_student(EVERY)
    drops = [round(point.drop, 2) for point in course]
    print(f'{name} {label} seed {seed}: {drops}', flush=True)
    yield {
      'config': base,
      'variant': name,
      'bits': label,
      'seed': seed,
      'overrides': fields,
      'every': EVERY,
      'drops': drops,
      'divergences': [round(point.divergence, 4) for point in course],
      **common.provenance(),
    }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('group', choices=GROUPS)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  args = parser.parse_args()
  base = CONFIGS[args.group]
  done = {
    (r['config'], r['variant'], r['seed']) for r in records.lines(RECORDS)
  }
  for seed in args.seeds:
    stages = Stages()
    for name, variant in GROUPS[args.group].items():
      if (base, name, seed) not in done:
        new = list(measure(base, name, variant, seed, stages))
        records.append(RECORDS, *new)
  return 0


if __name__ == '__main__':
  sys.exit(main())
