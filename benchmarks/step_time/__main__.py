"""Seconds per joint step: this project's `Steps.joint_step` and plain PyTorch.

    python -m benchmarks.step_time [--generator=slim|full|both] [--check]

`torch_step.py` is the same step in eager PyTorch. Weights and centroids are
random, because the time does not depend on them. Both sides augment every
batch.

Each framework runs in processes of its own, in turns. A process discards two
steps and times `--steps`. There are `--rounds` processes per framework. The
script prints medians with ranges, and the ratios of the rounds' medians. No
step time contains the compilation. Beside other work PyTorch loses more time
than JAX.

`--check` runs one step of both from the same parameters, noise and labels, in
float64, and compares losses, centroids and gradients. It ends with exit code 1
where they differ. Give it a batch of 24 images or more: the class terms need an
image that the teacher classifies correctly.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata, util

import numpy as np

from benchmarks import common
from benchmarks.step_time import setting

WARM_UP = 2
TOLERANCE = 1e-3  # of --check, relative


# ------------------------------------------------------------------- children
#
# A process that times JAX never imports torch.


def _torch_step(args, arrays, fixed=None):
  import torch

  from benchmarks.step_time import torch_step

  torch.set_num_threads(args.threads)
  torch.set_default_dtype(torch.float64 if args.check else torch.float32)
  if fixed is not None:
    z, labels = map(torch.tensor, fixed)
    fixed = z, labels.long()
  return torch_step.TorchStep(args, arrays, fixed)


def _compared(ours, plain, expected, found):
  """Yields name, JAX's and PyTorch's value of all that must be equal."""
  from benchmarks.step_time import jax_step, torch_step

  for name, value in found.items():
    yield name, expected[name], value
  layers = zip(ours.state.centroids.layers, plain.centroids, strict=True)
  for i, (a, b) in enumerate(layers):
    yield f'centroids/{i}', np.stack(a), b
  # Adam's first moment after one step is the gradient times 1 - decay.
  mu = {
    name.partition('/mu/')[2]: value
    for part in (ours.state.generator_opt, ours.state.student_opt)
    for name, value in jax_step.flatten(part).items()
    if '/mu/' in name
  }
  for name, prefix, decay, trained in (
    ('generator', '', 0.5, plain.generator),
    ('student', 'params/', 0.9, plain.params),
    ('quantizer', 'quant/', 0.9, plain.quant),
  ):
    a = [torch_step.from_jax(f'/{k}', mu[prefix + k]).ravel() for k in trained]
    b = [v.grad.numpy().ravel() for v in trained.values()]
    yield (
      f'gradient/{name}',
      np.concatenate(a) / (1 - decay),
      np.concatenate(b),
    )


def check(args) -> int:
  """Runs one step of both from the same state; returns 1 where they differ.

  In float64: in float32 the last bit decides a few codes of the quantizers,
  and each of them the codes after it.
  """
  import jax

  from benchmarks.step_time import jax_step

  ours = jax_step.JaxStep(args)
  # What `joint_step` draws at step 0.
  key = jax.random.fold_in(jax.random.key(args.seed), 0)
  z_key, label_key = jax.random.split(jax.random.split(key, 3)[0])
  z = jax.random.normal(z_key, (args.batch_size, setting.LATENT))
  labels = jax.random.randint(label_key, (args.batch_size,), 0, setting.CLASSES)
  plain = _torch_step(args, ours.inputs, (np.asarray(z), np.asarray(labels)))
  expected, found = ours(), plain()
  if not expected['generator/sfda']:
    print('the teacher classifies no image correctly: try another --seed')
    return 1
  worst = 0.0
  for name, *values in _compared(ours, plain, expected, found):
    a, b = (np.asarray(v, np.float64) for v in values)
    error = np.linalg.norm(a - b) / np.linalg.norm(a)
    worst = np.maximum(worst, error)
    sizes = f'jax {np.linalg.norm(a):.6g}, torch {np.linalg.norm(b):.6g}'
    print(f'{name:22s} {sizes}, relative {error:.1e}')
  same = bool(worst <= TOLERANCE)
  print(args.generator, 'is the same work' if same else 'DIFFERS')
  return int(not same)


def child(args) -> int:
  """Times one framework; prints JSON."""
  if args.child == 'jax':
    from benchmarks.step_time import jax_step

    step = jax_step.JaxStep(args)
    np.savez(args.inputs, **step.inputs)
  else:
    step = _torch_step(args, dict(np.load(args.inputs)))
  seconds = []
  for _ in range(WARM_UP + args.steps):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
  compile_s = getattr(step, 'compile_s', 0.0)
  print(json.dumps([seconds[WARM_UP:], compile_s]))
  return 0


# --------------------------------------------------------------------- parent
def start(kind: str, generator: str, inputs: str = '', **kwargs):
  own = [f'--child={kind}', f'--generator={generator}', f'--inputs={inputs}']
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  return common.start(
    'benchmarks.step_time', *sys.argv[1:], *own, env=env, **kwargs
  )


def measure(args, generator: str) -> None:
  """Times both frameworks in turns and prints what they took."""
  times: dict[str, list] = {'jax': [], 'torch': []}
  compiled = []
  with tempfile.TemporaryDirectory() as folder:
    inputs = str(pathlib.Path(folder, 'inputs.npz'))
    for i in range(args.rounds):
      for kind, rounds in times.items():
        process = start(kind, generator, inputs, stdout=subprocess.PIPE)
        output, _ = process.communicate()
        if process.returncode:
          sys.exit(f'error: the {kind} process ended with {process.returncode}')
        seconds, compile_s = json.loads(output.splitlines()[-1])
        rounds.append(seconds)
        compiled += [compile_s] * (kind == 'jax')
        print(f'  {generator} round {i + 1} {kind}: {common.spread(seconds)}')
  medians = [[statistics.median(s) for s in r] for r in times.values()]
  ratios = [a / b for a, b in zip(*medians, strict=True)]
  for kind, rounds in times.items():
    print(f'{generator}: {kind} {common.spread(sum(rounds, []))} s/step')
  print(f'{generator}: jax/torch {common.spread(ratios)}, medians of rounds')
  print(f'{generator}: jax compiles in {common.spread(compiled)} s')


def _parse():
  parser = argparse.ArgumentParser(
    prog='benchmarks.step_time', description=__doc__.splitlines()[0]
  )
  add = parser.add_argument
  add('--generator', default='both', choices=[*setting.CHANNELS, 'both'])
  add('--batch_size', type=int, default=128)
  add('--steps', type=int, default=10, help='timed ones, per round')
  add('--rounds', type=int, default=3, help='processes per framework')
  add('--threads', type=int, default=len(os.sched_getaffinity(0)))
  add('--seed', type=int, default=0)
  add('--check', action='store_true', help='compare results, time nothing')
  add('--child', help=argparse.SUPPRESS)
  add('--inputs', help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> int:
  args = _parse()
  if args.child:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: args.threads])  # for XLA
    if args.check:
      os.environ['JAX_ENABLE_X64'] = '1'
    return check(args) if args.check else child(args)
  if util.find_spec('torch') is None:
    print('error: PyTorch is missing: pip install torch', file=sys.stderr)
    return 2
  names = setting.CHANNELS if args.generator == 'both' else [args.generator]
  if args.check:
    return max(start('check', name).wait() for name in names)
  versions = [f'{n} {metadata.version(n)}' for n in ('jax', 'jaxlib', 'torch')]
  print(
    f'{args.threads} threads, {common.machine()}, load average '
    f'{common.load_average()}, {", ".join(versions)}, batch {args.batch_size}'
  )
  if common.load_average() > 0.5:
    print('warning: the machine is busy; the ratio is not to be trusted')
  for name in names:
    measure(args, name)
  return 0


if __name__ == '__main__':
  sys.stdout.reconfigure(line_buffering=True)
  sys.exit(main())
