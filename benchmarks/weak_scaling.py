"""Compiles joint steps for TPU v5e pods and computes how they would scale.

    pip install -e '.[dryrun]'    # libtpu; in an environment of its own
    python -m benchmarks.weak_scaling resnet18 resnet50

Nothing runs on a TPU. The script prints the work of one chip, and its images
per second against those of a single chip, at the roofline of
`clusterq_jax/runtime/roofline.py`. The first rows split the paper's batch among
as many chips as divide it. The others keep the batch per chip constant. Weights
are random. Everything else is from configs/paper/ARCH.py.
"""

import argparse
import functools
import runpy
import sys

from benchmarks import common, random_weights
from clusterq_jax import config as config_lib
from clusterq_jax.errors import InputError
from clusterq_jax.modes import dryrun
from clusterq_jax.runtime import roofline

CONFIGS = common.ROOT / 'configs' / 'paper'
CLASSES = 1000
SIDES = (1, 2, 4, 8, 16)  # of the pod, in chips
PER_CHIP = (16, 64)  # images
COLUMNS = (
  'network | chips | batch (per chip) | GB per chip | GFLOP per chip | '
  'MB in collectives | ms | efficiency'
)


def get_config(arch: str):
  return runpy.run_path(str(CONFIGS / f'{arch}.py'))['get_config']()


teacher = functools.cache(random_weights.teacher)


@functools.cache
def need(arch: str, side: int, batch: int) -> roofline.Need | str:
  """Compiles a joint step for side * side chips; batch: of all chips."""
  pod = roofline.topology(f'v5e:{side}x{side}')
  config = get_config(arch)
  config.schedule.batch_size = batch
  target = dryrun.Target(
    pod, config_lib.resolve(config), teacher(arch, CLASSES)
  )
  return target.need(target.steps.joint_step)


def series(arch: str, batches: dict[int, int]) -> None:
  """Prints a row per pod; batches: of all chips, by the pod's side."""
  alone = None  # images per second of one chip
  for side, batch in batches.items():
    chips = side * side
    found = need(arch, side, batch)
    row = [arch, str(chips), f'{batch} ({batch // chips})']
    if isinstance(found, str):
      row += ['does not fit', '', '', '', '']
    else:
      rate = batch / chips / found.step_s
      alone = rate if chips == 1 else alone
      row += [
        f'{found.memory / 1e9:.2f}',
        f'{found.flops / 1e9:.0f}',
        f'{found.network_bytes / 1e6:.1f}',
        f'{1e3 * found.step_s:.1f}',
        f'{100 * rate / alone:.1f} %' if alone else '',
      ]
    print(f'| {" | ".join(row)} |', flush=True)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('archs', nargs='+', choices=['resnet18', 'resnet50'])
  print(f'| {COLUMNS} |\n{"|---" * 8}|')
  try:
    for arch in parser.parse_args().archs:
      paper = get_config(arch).schedule.batch_size
      series(arch, {n: paper for n in SIDES if paper % n**2 == 0})
      for images in PER_CHIP:
        series(arch, {n: images * n**2 for n in SIDES})
  except InputError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
