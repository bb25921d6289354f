"""Measures an accelerator; one command, which a person with a GPU or TPU runs.

    python -m benchmarks.accelerator [--workdir=DIR] [--piece_minutes=9]

It prints devices, memory and versions, and measures in this order:

1. whether the integer network equals ONNX Runtime bit for bit, although
   products are rounded to TF32 outside;
2. joint, student and procedural steps and the calibration of a CIFAR, an
   ImageNet and an imported network, in float32 and bfloat16, with 1 step and
   with the default number of steps per call;
3. the joint step here and in eager PyTorch, on a GPU that torch finds too;
4. the short recipe, from the weights to the integer file;
5. the paper's own schedule: 80,000 steps.

Weights are random where times do not depend on them. The runs need CIFAR-10
from $CLUSTERQ_TEST_DATA, by default ../shared/data, and torch to read its
weights. Without them, the short recipe takes the embedded network, and the
paper's schedule is left out.

Each piece leaves one line in records/accelerator.jsonl beside this file. Pieces
with a line for the same kind and number of devices are left out. Everything
else lies in the workdir, also a copy of each line. With --piece_minutes, or on
SIGTERM, the script stops in time with exit code 0. The same command goes on, on
another machine with a copy of the workdir.

`--smoke` takes the script through on a CPU with tiny networks. Its lines stay
in the workdir.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import util
from typing import Any

from benchmarks import common, records

RECORDS = records.FOLDER / 'accelerator.jsonl'
_KINDS = ('joint', 'student', 'procedural', 'calibration')
_CONFIGS = ('cifar10_resnet20_fast', 'resnet18', 'quantize')
_DTYPES = ('float32', 'bfloat16')
_PIECES = 'benchmarks.accelerator_pieces'
INPUTS = 'inputs.npz'  # of the joint step in both frameworks
_GRACE_S = 60.0  # for a run that is told to stop: it compiles, or it saves
_KEPT = (
  'teacher student deployed synthetic forecast steps wall_s compile_s '
  'images_per_s'
).split()

# CIFAR-10's network, in the workdir and where it comes from.
_WEIGHTS, _IMAGES = 'resnet20.safetensors', 'cifar10.npz'
_SOURCE = common.DATA / 'weights' / 'resnet20-12fca82f.th'
_CIFAR = (
  '--image_size=32,32',
  '--mean=0.485,0.456,0.406',
  '--std=0.229,0.224,0.225',
)
# Runs, by piece: their config and the fields that --smoke sets.
_TINY = {
  'teacher.arch': 'resnet8',
  'checkpoint_every': 10,
  'generator.channels': '(8, 8)',
  'schedule.batch_size': 8,
  'report.log_every': 5,
}
_RUNS = {
  'short_recipe': (
    'cifar10_resnet20_fast',
    _TINY
    | {
      'budget': 0.02,
      'schedule.procedural_batches': 0,
      'quant.ranges': 'minmax',
    },
  ),
  'paper': (
    'paper/cifar10_resnet20',
    _TINY
    | {
      'schedule.warmup_steps': 10,
      'schedule.joint_steps': 200,
      'centroids.images_per_class': 2,
    },
  ),
}


def groups(smoke: bool) -> dict[str, list[str]]:
  """Returns the names of the pieces that one process measures, by group."""
  found = {'exactness': ['embedded', 'imported']}
  for config in _CONFIGS:
    for dtype in _DTYPES:
      found[f'steps-{config}-{dtype}'] = list(_KINDS)
  found['torch'] = ['jax', 'torch']
  if smoke:  # compilation takes long on a CPU
    found = {
      'exactness': ['imported'],
      'steps-quantize-bfloat16': ['joint', 'calibration'],
      'torch': ['jax', 'torch'],
    }
  return {
    group: [f'{group}-{name}' for name in names]
    for group, names in found.items()
  }


class Call:
  """This call of the script: its time, and the process that it waits for.

  Attributes:
    stopped: whether the time is over, or the script was told to stop.
    over: whether the time is over.
  """

  def __init__(self, minutes: float | None):
    self.stopped = self.over = False
    self._process: subprocess.Popen | None = None
    if minutes is not None:
      grace = min(_GRACE_S, 20 * minutes)
      for seconds, end in (
        (60 * minutes - grace, self._end),
        (60 * minutes - grace / 4, self._kill),
      ):
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()

  def stop(self, *_: object) -> None:
    """Tells the process to stop; it may save its state first."""
    self.stopped = True
    if self._process is not None:
      self._process.terminate()

  def _end(self) -> None:
    self.over = True
    self.stop()

  def _kill(self) -> None:
    if self._process is not None:
      self._process.kill()

  def lines(self, module: str, *arguments: str, **kwargs: Any) -> Iterator[str]:
    """Runs a process and yields the lines that it prints.

    Raises:
      subprocess.CalledProcessError: it failed.
    """
    if self.stopped:
      return
    process = common.start(
      module, *arguments, stdout=subprocess.PIPE, text=True, **kwargs
    )
    self._process = process
    if self.stopped:  # in the meantime
      process.terminate()
    assert process.stdout is not None
    for line in process.stdout:
      yield line.rstrip('\n')
    code, self._process = process.wait(), None
    if code and not self.stopped:
      raise subprocess.CalledProcessError(code, [module, *arguments])


class Bench:
  """What is measured, and where it is kept.

  Attributes:
    failed: whether a piece failed.
  """

  def __init__(self, args: argparse.Namespace, call: Call):
    self._call, self._smoke = call, args.smoke
    self._folder = args.workdir.resolve()
    self._folder.mkdir(parents=True, exist_ok=True)
    self._own = self._folder / 'accelerator.jsonl'
    # Another machine may have no git.
    self._commit = self._folder / 'commit'
    if not self._commit.exists():
      self._commit.write_text(common.commit())
    self._output = args.output
    paths = [str(common.ROOT), os.environ.get('PYTHONPATH', '')]
    self._env = {'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    # A run that resumes finds its programs again.
    self._cache = {'JAX_COMPILATION_CACHE_DIR': str(self._folder / 'compiled')}
    if args.smoke:
      self._env |= {
        'JAX_PLATFORMS': 'cpu',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      }
    self._device: dict[str, Any] = {}
    self._new = 0  # records of this call
    # Pieces that a whole call was too short for.
    self._cut = self._folder / 'too_long'
    self.failed = False

  def measure(self) -> None:
    """Measures every piece that has no record, until time is over.

    Raises:
      SystemExit: there is no accelerator.
    """
    found = list(self._child(_PIECES, 'device', str(self._folder)))
    if not found:  # stopped
      return
    self._device = json.loads(found[-1])
    print(json.dumps(self._device, indent=2), flush=True)
    if self._device['platform'] == 'cpu' and not self._smoke:
      sys.exit('error: JAX finds no accelerator; --smoke tries it on a CPU')
    self._share()
    for group, pieces in groups(self._smoke).items():
      self._group(group, pieces)
    for piece in _RUNS:
      self._run(piece)

  # ---------------------------------------------------------------- records

  def _key(self, record: records.Record) -> tuple:
    device = record['device']
    return record['piece'], device['device'], device['count']

  def _has(self, piece: str) -> bool:
    wanted = self._key({'piece': piece, 'device': self._device})
    return wanted in map(self._key, records.lines(self._own))

  def _share(self) -> None:
    """Copies records between the workdir and the output, both ways."""
    if self._output is None:
      return
    for source, target in (
      (self._own, self._output),
      (self._output, self._own),
    ):
      known = set(map(self._key, records.lines(target)))
      new = [r for r in records.lines(source) if self._key(r) not in known]
      records.append(target, *new)

  def _record(self, piece: str, found: dict[str, Any]) -> None:
    found.pop('piece', None)
    if 'skipped' in found:
      print(f'== {piece}: skipped: {found["skipped"]}', flush=True)
      return
    record = {
      'piece': piece,
      **found,
      'device': self._device,
      'command': 'python -m benchmarks.accelerator',
      **common.provenance(),
      'commit': self._commit.read_text(),
    }
    records.append(self._own, record)
    self._new += 1
    self._share()
    print(f'== {piece}: {json.dumps(found)}', flush=True)

  # ----------------------------------------------------------------- pieces

  def _child(self, module: str, *arguments: str, **env: str) -> Iterator[str]:
    smoke = ['--smoke'] if self._smoke and module == _PIECES else []
    return self._call.lines(
      module,
      *arguments,
      *smoke,
      folder=self._folder,
      variables=self._env | env,
    )

  def _group(self, group: str, pieces: list[str]) -> None:
    """Measures the pieces of a group that have no record yet."""
    missing = [piece for piece in pieces if not self._has(piece)]
    if group == 'torch' and missing and not (self._folder / INPUTS).exists():
      missing = pieces  # one side gives the other its inputs
    cut = self._cut.read_text().split() if self._cut.exists() else []
    for piece in set(missing) & set(cut):
      print(f'== {piece}: skipped: {self._cut} names it', flush=True)
    missing = [piece for piece in missing if piece not in cut]
    # A process that times JAX never imports torch.
    for part in [[p] for p in missing] if group == 'torch' else [missing]:
      if not part or self._call.stopped:
        continue
      print(f'== {", ".join(part)}', flush=True)
      try:
        for line in self._child(_PIECES, group, str(self._folder), *part):
          if not line.startswith('{'):  # of a library
            continue
          found = json.loads(line)
          if not self._has(found['piece']):
            self._record(found['piece'], found)
      except subprocess.CalledProcessError as e:
        self.failed = True
        print(f'== {group}: failed: {e}', file=sys.stderr, flush=True)
      if self._call.over and not self._new:
        with self._cut.open('a') as file:
          file.write(f'{part[0]}\n')

  # ------------------------------------------------------------------- runs

  def _prepare(self) -> bool:
    """Puts CIFAR-10's network and images into the workdir, if they are there.

    Runs name them without folders: a copy of the workdir resumes anywhere.
    """
    weights, images = self._folder / _WEIGHTS, self._folder / _IMAGES
    source = common.DATA / 'cifar10_dev.npz'
    if not images.exists() and source.exists() and not self._smoke:
      shutil.copyfile(source, images)
    if weights.exists():
      return True
    if self._smoke:
      given = '--arch=resnet8', '--num_classes=10'
      list(
        self._child('benchmarks.random_weights', *given, f'--output={weights}')
      )
    elif _SOURCE.exists() and util.find_spec('torch') is not None:
      given = '--arch=resnet20', f'--input={_SOURCE}', f'--output={weights}'
      list(
        self._child(
          'clusterq_jax.convert', *given, *_CIFAR, JAX_PLATFORMS='cpu'
        )
      )
    return weights.exists()

  def _run(self, piece: str) -> None:
    """Runs a config to its end, or until time is over."""
    if self._has(piece) or self._call.stopped:
      return
    print(f'== {piece}', flush=True)
    try:
      found = self._results(piece)
    except subprocess.CalledProcessError as e:
      self.failed = True
      print(f'== {piece}: failed: {e}', file=sys.stderr, flush=True)
      return
    if found:
      self._record(piece, found)
    elif not self._call.stopped:
      self.failed = True
      print(f'== {piece}: ended early', file=sys.stderr, flush=True)

  def _results(self, piece: str) -> dict[str, Any]:
    """Returns what a finished run measured; {} if it was stopped."""
    config, tiny = _RUNS[piece]
    given: dict[str, Any] = {}
    if self._prepare():
      given['teacher.weights'] = _WEIGHTS
      if (self._folder / _IMAGES).exists():
        given |= {'eval.source': 'npz', 'eval.path': _IMAGES}
    elif piece == 'short_recipe':
      config, given['budget'] = 'fashion_mnist_resnet20', 1.0
    else:
      why = f'needs {_SOURCE} and torch: set CLUSTERQ_TEST_DATA'
      return {'skipped': why}
    if self._smoke:
      given |= tiny
    path = common.ROOT / 'configs' / f'{config}.py'
    folder = self._folder / config.replace('/', '_')
    for line in self._child(
      'clusterq_jax.main',
      f'--config={path}',
      f'--workdir={folder.name}',
      '--distributed=off',
      *(f'--config.{name}={value}' for name, value in given.items()),
      **self._cache,
    ):
      print(line, flush=True)
    file = folder / 'results.json'
    results = json.loads(file.read_text()) if file.exists() else {}
    if 'wall_s' not in results:
      return {}
    return {'config': config, **{k: results.get(k) for k in _KEPT}}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  workdir = common.ROOT / 'runs' / 'accelerator'
  add('--workdir', type=pathlib.Path, default=workdir)
  add('--output', type=pathlib.Path, help=f'default: {RECORDS}')
  add('--piece_minutes', type=float, help='stop in time; default: never')
  add('--smoke', action='store_true', help='tiny, on a CPU, nothing recorded')
  args = parser.parse_args()
  if args.smoke and args.output:
    parser.error('--smoke records nothing: leave out --output')
  if not args.smoke:
    args.output = args.output or RECORDS
  call = Call(args.piece_minutes)
  signal.signal(signal.SIGTERM, call.stop)
  bench = Bench(args, call)
  bench.measure()
  if call.stopped:
    print('stopped in time: run the same command again', flush=True)
    return 0
  print('done' + ', but a piece failed' * bench.failed, flush=True)
  return int(bench.failed)


if __name__ == '__main__':
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit(130)
