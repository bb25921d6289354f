"""Ablations: the student's drop, step by step, without this and without that.

    python -m benchmarks.ablation class_terms [--seeds 0 1 2]
    python -m benchmarks.ablation ideas [--seeds 0 1 2]
    python -m benchmarks.ablation many_classes [--seeds 0 1 2]
    python -m benchmarks.ablation GROUP --table        # of what was measured

On CIFAR-10, or for `many_classes` CIFAR-100, with the recipe a quarter as long:
from each variant's generator a student of W4A4 and one of W3A3, evaluated along
the way. A line for each goes to records/ablation.jsonl beside this file; what
has one is not run again. The script ends with a table of all lines; results.py
draws their curves.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accuracy, time_to_accuracy
from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.runtime import reuse
from clusterq_jax.runtime import session as experiment

RECORDS = pathlib.Path(__file__).parent / 'records' / 'ablation.jsonl'
BITS = {'W4A4': 4, 'W3A3': 3}
# Of a record's lists: unit, and format.
FIGURES = {'drops': ('drop, points', '.2f'), 'divergences': ('KL, nats', '.4f')}
EVERY = 30  # student steps per evaluation
RECIPE = config_lib.flatten(config_lib.fast())
SHORT = {
  field: value
  for field, value in config_lib.flatten(config_lib.fast(1 / 4)).items()
  if value != RECIPE[field]
} | {
  # Came after most of the records; whole runs tell what it does.
  'augment.adversarial': 0.0,
}
# Differences of each variant to the recipe, by group. The charts draw every
# variant beside the first of its group.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
  'class_terms': {
    'none': time_to_accuracy.NO_CLASS_TERMS,
    'recipe': {},
    # The paper's table IV, with the run that `no_diversity` must be compared
    # with: diversity is SFDA with noise on its target, so without it SFDA
    # weighs less in all.
    'no_diversity': {'loss.diversity': 0.0},
    'no_ema': {'centroids.decay': 0.0},
    'neither': {'loss.diversity': 0.0, 'centroids.decay': 0.0},
    'sfda_raised': {
      'loss.sfda': RECIPE['loss.sfda'] + RECIPE['loss.diversity'],
      'loss.diversity': 0.0,
    },
    # Other uses. Summed over ten classes, as eq. 4 has it, they weigh ten
    # times as much, which is about as much as the statistics of all.
    'summed': {'loss.class_reduction': 'sum'},
    'late': {'centroids.first_layer': 13},  # the last stage alone
    'everywhere': {'centroids.first_layer': 0},
    'paper_noise': {'loss.noise': (0.5, 1.0)},  # of the stored deviations
  },
  # Without each of what the recipe adds to the paper.
  'ideas': {
    'recipe': {},
    'cross_entropy': {'loss.student_cross_entropy': 1.0},
    'no_features': {'loss.features': 0.0},
    'no_mixup': {'augment.mixup': 0.0},
    'no_headroom': {'quant.headroom': 0.0},
    'minmax_ranges': {'quant.ranges': 'minmax'},
    'no_procedural': {'schedule.procedural_batches': 0},
    # As many images, of which the generator, untrained, makes one batch: a
    # config without any would be refused.
    'no_generator': {
      'schedule.warmup_steps': 0,
      'schedule.generator_steps': 1,
      'schedule.pool_batches': 1,
      'schedule.procedural_batches': SHORT['schedule.pool_batches']
      + SHORT['schedule.procedural_batches']
      - 1,
    },
    'no_prototypes': {'generator.prototypes': 0},
    'unconditional': {'generator.conditional': False},
    'absolute_statistics': {'loss.relative': 'noise'},
  },
}
# Those of which CIFAR-10 shows nothing, on ten times the classes.
GROUPS['many_classes'] = {
  name: GROUPS['ideas'][name]
  for name in (
    'recipe',
    'cross_entropy',
    'no_mixup',
    'no_headroom',
    'no_prototypes',
    'unconditional',
    'absolute_statistics',
  )
}
CONFIGS = dict.fromkeys(GROUPS, 'cifar10_resnet20_fast') | {
  'many_classes': 'cifar100_variant'
}
# Beginnings of fields that a stage of a run does not depend on.
_NOT_GENERATOR = (*reuse.STUDENT_FIELDS, 'schedule.procedural_batches')
_NOT_WARM_UP = (
  *_NOT_GENERATOR,
  'loss.sfda',
  'loss.diversity',
  'loss.noise',
  'loss.class_reduction',
  'centroids.',
)
_NOT_PROCEDURAL = (*reuse.STUDENT_FIELDS, 'loss.', 'centroids.', 'generator.')


class Stages:
  """What variants share of one seed: made once, kept on the host."""

  def __init__(self):
    self._kept: dict[tuple, dict[str, Any]] = {}

  def bring(self, bench: time_to_accuracy.Bench, variant: dict) -> None:
    """Brings a new bench to its first student step."""
    steps, schedule = bench.steps, bench.config.schedule
    learned = 'step', 'generator', 'generator_opt'

    def once(name, free, make, *fields):
      given = ((k, v) for k, v in variant.items() if not k.startswith(free))
      key = (name, *sorted(given))
      if key not in self._kept:
        make()
        made = {field: getattr(bench.state, field) for field in fields}
        self._kept[key] = jax.device_get(made)
      return self._kept[key]

    def give(**fields):
      if isinstance(fields['step'], int):
        fields['step'] = jnp.full_like(bench.state.step, fields['step'])
      everywhere = sharding.replicated(steps.mesh)
      bench.state = jax.device_put(bench.state.replace(**fields), everywhere)

    def train_generator():
      give(**once('warm-up', _NOT_WARM_UP, bench.warm_up, *learned))
      bench.train_generator()

    def make_procedural():
      give(step=steps.procedural_start)
      bench.make_procedural()

    fields = *learned, 'centroids', 'pool'
    made = once('generator', _NOT_GENERATOR, train_generator, *fields)
    drawn = steps.pool_batches * steps.batch_size
    pool = made['pool'][:drawn]
    if steps.procedural_batches:
      shared = once('procedural', _NOT_PROCEDURAL, make_procedural, 'pool')
      pool = np.concatenate([pool, shared['pool'][drawn:]])
    first = config_lib.total_steps(schedule) - schedule.student_steps
    give(**{**made, 'pool': pool, 'step': first})
    bench.calibrate()


def measure(
  base: str, name: str, variant: dict[str, Any], seed: int, stages: Stages
) -> Iterator[dict[str, Any]]:
  """Records of a variant, by bits; base: config that it varies."""
  for label, bits in BITS.items():
    fields = {'quant.weight_bits': bits, 'quant.activation_bits': bits}
    config = time_to_accuracy.read_config(base, seed, SHORT | variant | fields)
    images = experiment.load_images(config, experiment.load_teacher(config))
    bench = time_to_accuracy.Bench(config, images)
    stages.bring(bench, variant)
    course = bench.train_student(EVERY)
    record = {
      'config': base,
      'variant': name,
      'bits': label,
      'seed': seed,
      'overrides': variant,
      'every': EVERY,
      'drops': [round(point.drop, 2) for point in course],
      'divergences': [round(point.divergence, 4) for point in course],
      'kind': 'measured',
      'commit': accuracy.code(),
      'date': datetime.date.today().isoformat(),
      'machine': accuracy.machine(),
    }
    print(
      f'{name} {record["bits"]} seed {seed}: {record["drops"]}, '
      f'{record["divergences"]}',
      flush=True,
    )
    yield record


def table(records: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
  """Lines of a Markdown table: means of the last step, and every seed's."""
  columns = [(bits, of) for bits in BITS for of in FIGURES]
  heads = (f'{bits} {FIGURES[of][0]}' for bits, of in columns)
  yield f'| variant | {" | ".join(heads)} |'
  yield '|---' * (1 + len(columns)) + '|'
  for name in names:
    cells = []
    for bits, of in columns:
      some = [r for r in records if (r['variant'], r['bits']) == (name, bits)]
      ends = [r[of][-1] for r in sorted(some, key=lambda r: r['seed'])]
      mean, *ends = (
        f'{x:{FIGURES[of][1]}}' for x in (statistics.mean(ends), *ends)
      )
      cells.append(f'{mean} ({", ".join(ends)})')
    yield f'| `{name}` | {" | ".join(cells)} |'


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('group', choices=GROUPS)
  add('--seeds', type=int, nargs='+', default=[0, 1, 2])
  add('--table', action='store_true', help='print the table, run nothing')
  args = parser.parse_args()
  group, base = GROUPS[args.group], CONFIGS[args.group]

  def known():
    return [r for r in accuracy.read(RECORDS) if r['config'] == base]

  for seed in [] if args.table else args.seeds:
    stages = Stages()
    for name, variant in group.items():
      done = {(r['variant'], r['seed']) for r in known()}
      if (name, seed) not in done:
        new = list(measure(base, name, variant, seed, stages))
        with RECORDS.open('a') as file:
          file.writelines(json.dumps(record) + '\n' for record in new)
  records = known()
  names = [n for n in group if n in {r['variant'] for r in records}]
  if not names:
    print(f'error: {RECORDS}: no records of {args.group}', file=sys.stderr)
    return 2
  print('\n'.join(table(records, names)))
  return 0


if __name__ == '__main__':
  sys.exit(main())
