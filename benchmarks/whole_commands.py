"""Measures time, drop and memory of whole commands at several budgets.

    python -m benchmarks.whole_commands [--config=NAME] [--bits=W4A4]
        [--budgets 0.25 0.5] [--seeds 0 1 2] [--root=FOLDER]

Each command has a new workdir and, with the empty cache of compiled programs,
compiles everything. Its time is that from the start of the process to the file
student.safetensors. Real images measure the student afterwards.

A line for each command goes to records/whole_commands.jsonl beside this file.
A command that has its line is not run again. --root=FOLDER runs another
checkout of the project and prints the lines only, for ratios to it.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import accuracy, common, records

RECORDS = records.FOLDER / 'whole_commands.jsonl'
_OF_RUN = ('wall_s', 'compile_s', 'compile_total_s', 'peak_rss_mb')


def command(root: pathlib.Path, *arguments: str) -> None:
  """Runs clusterq_jax.main of a checkout, with nothing compiled before.

  Raises:
    subprocess.CalledProcessError: the command failed.
  """
  env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': ''}
  env['PYTHONPATH'] = str(root)
  run = [sys.executable, '-m', 'clusterq_jax.main', *arguments]
  subprocess.run(run, cwd=root, env=env, check=True)


def measure(root: pathlib.Path, named: dict[str, Any]) -> records.Record:
  """Runs a command, evaluates its student, and returns the record.

  Args:
    root: checkout of the project.
    named: config, bits, budget and seed.
  """
  weights, activations = named['bits'].removeprefix('W').split('A')
  evaluated, given = accuracy.inputs(named['config'])
  evaluation = {k: v for k, v in given.items() if k.startswith('eval.')}
  training = {k: v for k, v in given.items() if k not in evaluation}
  training |= {
    'seed': named['seed'],
    'budget': named['budget'],
    'quant.weight_bits': int(weights),
    'quant.activation_bits': int(activations),
    # As in the other records, and for comparison with published drops.
    'quant.placement': 'paper',
  }

  def flags(fields: dict[str, Any]) -> list[str]:
    return [f'--config.{key}={value}' for key, value in fields.items()]

  load = common.load_average()
  with tempfile.TemporaryDirectory() as folder:
    both = [f'--config={named["config"]}', f'--workdir={folder}/run']
    both += flags(training)
    began = time.time()
    command(root, *both, *flags({'eval.source': 'none'}))
    student = pathlib.Path(folder, 'run', 'student.safetensors')
    seconds = student.stat().st_mtime - began
    run = json.loads(student.with_name('results.json').read_text())
    command(root, *both, '--mode=evaluate', *flags(evaluation))
    results = json.loads(student.with_name('results.json').read_text())
    divergence = accuracy.divergence(student.parent, named['config'])
  provenance = common.provenance()
  provenance['machine']['load'] = load  # before the command, which adds its own
  return {
    **named,
    'seconds': round(seconds, 1),
    'drop': round(results['teacher']['top1'] - results['student']['top1'], 4),
    'divergence': divergence,
    'agreement': results['student']['agreement'],
    'evaluated_on': evaluated,
    'images': results['student']['n'],
    **{key: run.get(key) for key in _OF_RUN},
    **provenance,
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--config', default='cifar10_resnet20_fast')
  add('--bits', default='W4A4')
  add('--budgets', type=float, nargs='+', default=[0.25, 0.5, 1.0])
  add('--seeds', type=int, nargs='+', default=[0, 1, 2])
  add('--root', type=pathlib.Path, default=common.ROOT)
  args = parser.parse_args()
  ours = args.root.resolve() == common.ROOT
  for budget, seed in itertools.product(args.budgets, args.seeds):
    named = {'config': args.config, 'bits': args.bits}
    named |= {'budget': budget, 'seed': seed}
    known = records.lines(RECORDS) if ours else []
    if any(named.items() <= record.items() for record in known):
      continue
    record = measure(args.root.resolve(), named)
    print(json.dumps(record), flush=True)
    if ours:
      records.append(RECORDS, record)
  return 0


if __name__ == '__main__':
  sys.exit(main())
