"""The kinds of inputs: what is mutated, and the entry points that read it.

Each kind is a function `(random, seeds, folder)` that writes one mutated input
into the folder and loads it as a command would. It returns, or raises
`InputError`; anything else is a finding.
"""

import contextlib
import functools
import io
import json
import pathlib
import re
import sys
import unittest.mock
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from absl.testing import flagsaver

from clusterq_jax import config as config_lib
from clusterq_jax import convert, data
from clusterq_jax import main as main_lib
from clusterq_jax.deploy import student as student_lib
from clusterq_jax.errors import InputError
from clusterq_jax.layers import float_layers
from clusterq_jax.modes import quantize
from clusterq_jax.runtime import evaluation, reuse
from clusterq_jax.weights import teacher
from tests.fuzz import image_files, mutations, weight_files
from tests.fuzz import seeds as seeds_lib
from tests.fuzz.mutations import Random, damage, pick
from tests.fuzz.seeds import Seeds


def _read_teacher(path: pathlib.Path) -> None:
  convert.convert(
    seeds_lib.ARCH, str(path), str(path.with_name('new.safetensors'))
  )
  own = path.suffix == '.safetensors'
  expected = {} if own else dict(image_size=(8, 8), mean=(0,) * 3, std=(1,) * 3)
  teacher.load(seeds_lib.ARCH, str(path), **expected)


def _weights(suffix: str, random: Random, seeds: Seeds, folder) -> None:
  if suffix == '.npz':
    raw = seeds.npz
    ways = (
      damage,
      functools.partial(weight_files.rezip, change=weight_files.npy),
      weight_files.lying_sizes,
    )
  else:
    raw = seeds.safetensors
    ways = (
      damage,
      weight_files.header,
      weight_files.contents,
    )
  file = folder / f'a{suffix}'
  file.write_bytes(pick(random, ways)(random, raw))
  _read_teacher(file)


def _pth(zipped: bool, random: Random, seeds: Seeds, folder) -> None:
  raw = seeds.pth[zipped]
  kind = random.integers(4)
  if kind == 0:
    raw = seeds_lib.torch_file(
      weight_files.odd_state(random, seeds.torch_state), zipped
    )
  elif kind == 1:
    raw = damage(random, raw)
  elif zipped:
    change = functools.partial(weight_files.rezip, change=weight_files.pickled)
    raw = (change if kind == 2 else weight_files.lying_sizes)(random, raw)
  else:
    raw = weight_files.pickled(random, raw)
  file = folder / 'a.pth'
  file.write_bytes(raw)
  _read_teacher(file)


def _student(random: Random, seeds: Seeds, folder) -> None:
  file = folder / student_lib.FILE
  mutate = pick(random, (damage, weight_files.header, weight_files.contents))
  file.write_bytes(mutate(random, seeds.student))
  _load_student(folder)


def _load_student(folder: pathlib.Path) -> None:
  student = student_lib.load(folder)
  images = jax.ShapeDtypeStruct((2, *student.preprocessing.shape), np.uint8)
  jax.eval_shape(student.logits, images)


def _teacher_graph(random: Random, seeds: Seeds, folder) -> None:
  file = folder / 'a.safetensors'
  mutate = weight_files.graph if random.integers(4) else weight_files.header
  file.write_bytes(mutate(random, seeds.imported))
  loaded = teacher.load('', str(file))
  network = loaded.build(float_layers.layer_set())
  images = jax.ShapeDtypeStruct((2, *loaded.preprocessing.shape), np.float32)
  jax.eval_shape(network.apply, loaded.variables, images)


def _student_graph(random: Random, seeds: Seeds, folder) -> None:
  (folder / student_lib.FILE).write_bytes(
    weight_files.graph(random, seeds.student)
  )
  _load_student(folder)


def _program(release: str, random: Random, seeds: Seeds, folder) -> None:
  ways = (
    damage,
    weight_files.lying_sizes,
    functools.partial(weight_files.rezip, change=weight_files.program),
    functools.partial(weight_files.reprogram, change=weight_files.program),
  )
  file = folder / 'a.pt2'
  # Most of a program is its calls.
  way = ways[min(int(random.integers(8)), 3)]
  file.write_bytes(way(random, seeds.programs[release]))
  convert.import_network(
    str(file),
    str(folder / 'new.safetensors'),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
  )


def _evaluate(images: data.Images) -> None:
  """As a run does, with a network that is a function of numpy."""
  networks = {
    'teacher': lambda x: np.zeros((len(x), seeds_lib.CLASSES), np.float32)
  }
  evaluation.on_images(networks, images, 4)


def _images_npz(random: Random, seeds: Seeds, folder) -> None:
  ways = (
    damage,
    functools.partial(weight_files.rezip, change=weight_files.npy),
    weight_files.lying_sizes,
  )
  file = folder / 'a.npz'
  file.write_bytes(pick(random, ways)(random, seeds.images))
  shape = seeds.loaded.preprocessing.shape
  _evaluate(data.load('npz', str(file), shape, seeds_lib.CLASSES))


def _folder(kind: str, random: Random, seeds: Seeds, folder) -> None:
  """One sound image and one that is not, in class folders."""
  for name in ('1', '3'):
    (folder / name).mkdir()
  raw = image_files.picture(random, kind)
  way = random.integers(12)
  if way == 0:
    raw = pick(random, image_files.PNGS)()
  elif way == 1:
    raw = damage(
      random,
      image_files.picture(random, pick(random, image_files.FORMATS)),
    )
  else:
    raw = damage(random, raw)
  (folder / '1' / f'a.{kind.lower()}').write_bytes(raw)
  (folder / '3' / 'a.png').write_bytes(image_files.picture(random, 'PNG'))
  shape = seeds.loaded.preprocessing.shape
  resize = int(random.choice([0, seeds_lib.SIDE]))
  _evaluate(data.load('folder', str(folder), shape, seeds_lib.CLASSES, resize))


def _csv(random: Random, seeds: Seeds, folder) -> None:
  for name in ('a.png', 'b.png'):
    (folder / name).write_bytes(image_files.picture(random, 'PNG'))
  rows = [
    'file,label',
    *(f'{n}.png,{i % seeds_lib.CLASSES}' for i, n in enumerate('ababab')),
  ]
  for _ in range(random.integers(1, 3)):
    rows[int(random.integers(len(rows)))] = pick(random, image_files.ROWS)
  raw = '\n'.join(rows).encode('utf-8', 'surrogateescape')
  if not random.integers(3):
    raw = damage(random, raw)
  (folder / 'labels.csv').write_bytes(raw)
  shape = seeds.loaded.preprocessing.shape
  _evaluate(data.load('folder', str(folder), shape, seeds_lib.CLASSES))


class _ReachedError(Exception):
  """The command line got as far as compiling."""


def _trace(session, images, folder, began) -> None:
  """Does what a run does before its first compilation."""
  del folder, began
  state = session.abstract_state()
  if session.config.generator.workdir:
    reuse.take_generator(session, state)
  networks = session.steps.networks
  jax.eval_shape(networks.generate, state.generator, session.keys['train'])
  if images is not None:
    _evaluate(images)
  raise _ReachedError


def _command(*arguments: str) -> None:
  """The command line. Raises InputError with what it refused.

  Raises:
    AssertionError: it ended otherwise than with one line and exit code 2.
  """
  argv = ['main', '--distributed=off', *arguments]
  error = io.StringIO()
  with (
    unittest.mock.patch.object(sys, 'argv', argv),
    unittest.mock.patch.object(quantize, '_quantize', _trace),
    flagsaver.as_parsed(),
    contextlib.redirect_stderr(error),
  ):
    flags.FLAGS.unparse_flags()
    try:
      code = main_lib.main(argv)
    except _ReachedError:
      return
  said = error.getvalue()
  one_line = said.startswith('error: ') and said.count('\n') == 1
  assert code == 2, f'exit code {code}: {said}'
  assert one_line, said
  raise InputError(said.strip())


def _fields() -> list[str]:
  return sorted(config_lib.flatten(config_lib.default_config()))


def _flags(random: Random, seeds: Seeds, folder) -> None:
  """Overrides on the command line: of any field, to any value."""
  given = []
  for _ in range(random.integers(1, 3)):
    value = pick(random, mutations.VALUES)
    text = value if isinstance(value, str) else repr(value)
    text = text.replace('\0', '')  # no argument can have one
    field = pick(random, _fields())
    if not random.integers(20):
      field = pick(random, ['a', 'teacher', 'teacher.', 'student.lr.x', ''])
    given.append(f'--config.{field}={text[:1000]}')
  _command(
    f'--config={seeds.config_file}', f'--workdir={folder / "run"}', *given
  )


def _file(random: Random, seeds: Seeds, folder) -> None:
  """A config file that sets anything to anything."""
  lines = []
  for _ in range(random.integers(1, 3)):
    section, _, name = pick(random, _fields()).rpartition('.')
    target = f'config.{section}' if section else 'config'
    value = repr(pick(random, mutations.VALUES))
    value = re.sub(r'\b(inf|nan)\b(?!\')', r"float('\1')", value)
    assign = f'{target}.{name} = {value}'
    if random.integers(2):
      assign = f'with config.ignore_type(): {assign}'
    lines.append(f'  {assign}')
  file = folder / 'config.py'
  raw = seeds.config_text('\n'.join(lines)).encode('utf-8', 'replace')
  file.write_bytes(raw if random.integers(8) else damage(random, raw))
  _command(f'--config={file}', f'--workdir={folder / "run"}')


def _stored(random: Random, seeds: Seeds, folder) -> None:
  """config.json of the workdir, or of the one whose generator is taken."""
  given = [f'--config={seeds.config_file}', f'--workdir={folder / "run"}']
  name = 'run'
  if random.integers(2):
    name = 'other'
    given += [
      f'--config.generator.workdir={folder / name}',
      '--config.schedule.joint_steps=0',
    ]
  stored = config_lib.to_json(seeds.resolved)
  if name == 'other':
    stored['schedule']['joint_steps'] = 0
  if random.integers(4):
    text = json.dumps(mutations.change_json(random, stored))
  else:
    text = json.dumps(stored)
  raw = text.encode()
  if not random.integers(3):
    raw = damage(random, raw)
  (folder / name).mkdir()
  (folder / name / 'config.json').write_bytes(raw)
  _command(*given)


KINDS: dict[str, Callable[[Random, Seeds, pathlib.Path], None]] = {
  'program .pt2': functools.partial(_program, '2.13'),
  'program .pt2, pickled': functools.partial(_program, '2.7'),
  'graph of a teacher': _teacher_graph,
  'graph of a student': _student_graph,
  'weights .safetensors': functools.partial(_weights, '.safetensors'),
  'weights .npz': functools.partial(_weights, '.npz'),
  'weights .pth, zip': functools.partial(_pth, True),
  'weights .pth, pickle': functools.partial(_pth, False),
  'student.safetensors': _student,
  'images .npz': _images_npz,
  'images .png': functools.partial(_folder, 'PNG'),
  'images .jpeg': functools.partial(_folder, 'JPEG'),
  'labels.csv': _csv,
  'config flags': _flags,
  'config file': _file,
  'config.json': _stored,
}
if seeds_lib.torch is None:
  KINDS = {k: v for k, v in KINDS.items() if '.pth' not in k}


# Those that describe a network; the others hold arrays, images or a config.
NETWORKS = tuple(k for k in KINDS if k.startswith(('program', 'graph')))


def kind_of(number: int) -> str:
  return list(KINDS)[number % len(KINDS)]
