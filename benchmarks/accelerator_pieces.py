"""Measures the pieces of `benchmarks.accelerator`, each in a process.

    python -m benchmarks.accelerator_pieces GROUP FOLDER PIECE... [--smoke]

It prints one JSON object for each piece, as soon as the piece is measured.
Times are milliseconds per step: the median of several rounds, and their range.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accelerator, common, random_weights
from clusterq_jax import config as config_lib
from clusterq_jax import convert
from clusterq_jax.deploy import fold
from clusterq_jax.method import calibration, procedural
from clusterq_jax.quant import quantizers
from clusterq_jax.runtime import roofline
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime.session import Session

_ROUNDS = 5
_ROUND_S = 1.0  # about, of one round
_IMAGES = 64  # on which the integer network is compared
_PROGRAM = common.ROOT / 'tests' / 'assets' / 'se_network.pt2'
# Networks of the timed configs; '' is an imported one.
_ARCHS = {
  'cifar10_resnet20_fast': ('resnet20', 10),
  'resnet18': ('resnet18', 1000),
  'quantize': ('', 10),
}
_SEVERAL = 2  # steps per call, where one is the default
_TORCH_BATCH = 200

Found = dict[str, Any]


def device() -> Found:
  """Returns what computes: devices, their memory, and versions."""
  first = jax.devices()[0]
  memory = (first.memory_stats() or {}).get('bytes_limit')
  return {
    'platform': first.platform,
    'device': first.device_kind,
    'count': jax.device_count(),
    'memory_gb': None if memory is None else round(memory / 1e9, 1),
    'backend': ' '.join(first.client.platform_version.split()),
    'jax': jax.__version__,
    'jaxlib': metadata.version('jaxlib'),
    'python': platform.python_version(),
  }


# --------------------------------------------------------------------- steps


def _milliseconds(call: Callable[[], Any], steps: int, smoke: bool) -> Found:
  """Times a function that makes `steps` steps and does not wait for them."""
  for _ in range(2):  # the first call waits for memory
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
  calls = 1 if smoke else max(1, round(_ROUND_S / once))
  found = []
  for _ in range(1 if smoke else _ROUNDS):
    start = time.perf_counter()
    for _ in range(calls):
      last = call()
    jax.block_until_ready(last)
    found.append(1e3 * (time.perf_counter() - start) / calls / steps)
  return _spread(found)


def _spread(values: list[float]) -> Found:
  names = {'median': statistics.median, 'low': min, 'high': max}
  return {name: round(f(values), 4) for name, f in names.items()}


def _imported(folder: pathlib.Path) -> str:
  """Returns the weights file of the imported network; makes it if missing."""
  file = folder / 'se_network.safetensors'
  if not file.exists():
    convert.import_network(str(_PROGRAM), str(file), mean=(0.5,), std=(0.25,))
  return str(file)


def _session(
  name: str, dtype: str, per_call: int | None, folder: pathlib.Path, smoke: bool
) -> Session:
  """Returns a session of a config with all phases, on one device."""
  config = runpy.run_path(str(common.ROOT / 'configs' / f'{name}.py'))
  config = config['get_config']()
  config.schedule.joint_steps = 10
  config.compute_dtype = dtype
  config.steps_per_call = per_call
  arch, classes = _ARCHS[name]
  if smoke:
    config.budget = 0.005
    config.schedule.batch_size = 4
    config.generator.channels = (8, 8)
    config.quant.ranges = 'minmax'
  teacher = None
  if arch:
    arch, classes = ('resnet8', 10) if smoke else (arch, classes)
    config.teacher.arch = arch
    teacher = random_weights.teacher(arch, classes)
  else:
    config.teacher.weights = _imported(folder)
  resolved = config_lib.resolve(config)
  return Session(resolved, teacher, jax.devices()[:1])


def steps(
  group: str, pieces: list[str], folder: pathlib.Path, smoke: bool
) -> Iterator[Found]:
  """Times steps and the calibration of one config, with random weights."""
  _, name, dtype = group.split('-')
  sessions = [
    _session(name, dtype, per_call, folder, smoke) for per_call in (1, None)
  ]
  if sessions[1].steps_per_call == 1:
    sessions[1] = _session(name, dtype, _SEVERAL, folder, smoke)
  for piece in pieces:
    kind = piece.removeprefix(f'{group}-')
    time_kind = _calibration if kind == 'calibration' else _step
    first = sessions[0]
    yield {
      'piece': piece,
      'config': name,
      'compute_dtype': dtype,
      'step': kind,
      'batch': first.config.schedule.batch_size,
      'pixels': list(first.teacher.preprocessing.image_size),
      **time_kind(sessions, kind, smoke),
    }


def _step(sessions: list[Session], kind: str, smoke: bool) -> Found:
  """Times one kind of step, with each session's number of steps per call."""
  found: Found = {'ms': {}, 'compile_s': {}, 'memory_mb': {}}
  for session in sessions:
    (phase,) = (phase for phase in session.phases if phase.name == kind)
    state, before = session.init(), session.compile.seconds
    program = session.program(phase)
    count = session.steps_per_call
    found['compile_s'][count] = round(session.compile.seconds - before, 2)
    found['memory_mb'][count] = round(roofline.memory(program) / 1e6, 1)
    # Late enough that no procedural image is drawn.
    state = state.replace(step=jnp.full_like(state.step, phase.end))
    arguments = session.arguments(count)

    def call(program=program, held=[state], arguments=arguments):  # noqa: B006
      held[0], metrics = program(held[0], *arguments)
      return metrics

    del state  # the program reuses its memory
    found['ms'][count] = _milliseconds(call, count, smoke)
  return found


def _calibration(sessions: list[Session], _: str, smoke: bool) -> Found:
  session = sessions[0]
  held, before = [session.init()], session.compile.seconds

  def call():
    held[0] = session.transition('calibrate_student', held[0])
    return held[0].step

  found = _milliseconds(call, 1, smoke)
  compiled = round(session.compile.seconds - before, 2)
  return {'ms': {1: found}, 'compile_s': {1: compiled}}


# ----------------------------------------------------------------- exactness


def exactness(
  group: str, pieces: list[str], folder: pathlib.Path, smoke: bool
) -> Iterator[Found]:
  """Compares the integer network with ONNX Runtime, bit for bit.

  Outside, products are rounded to TF32. Calibration must not be, either.
  """
  for piece in pieces:
    if importlib.util.find_spec('onnxruntime') is None:
      yield {'piece': piece, 'skipped': 'pip install onnxruntime'}
      continue
    config = config_lib.default_config()
    if piece == f'{group}-imported':
      config = config_lib.quantize_config()
      config.teacher.weights = _imported(folder)
    if smoke:
      config.quant.ranges = 'minmax'
    session = Session(config_lib.resolve(config), devices=jax.devices()[:1])
    with jax.default_matmul_precision('tensorfloat32'):
      yield {'piece': piece, **_compared(session)}


def _compared(session: Session) -> Found:
  import onnxruntime

  from clusterq_jax.deploy import onnx_graph

  networks, prep = session.steps.networks, session.teacher.preprocessing
  draw = jax.jit(lambda key: procedural.dead_leaves(key, _IMAGES, prep.shape))
  x = draw(jax.random.key(0))

  def calibrated():
    calibrate = functools.partial(calibration.calibrate, networks)
    return jax.device_get(jax.jit(calibrate)(session.variables, x))

  student = calibrated()
  with jax.default_matmul_precision('highest'):
    again = calibrated()
  leaves = zip(jax.tree.leaves(student), jax.tree.leaves(again), strict=True)
  student['params'] = jax.device_get(quantizers.settle(networks.plan, student))
  whole = {
    **student,
    'batch_stats': jax.device_get(session.variables['batch_stats']),
  }
  folded = fold.fold(networks.graph, networks.plan, whole, prep)
  images = np.asarray(prep.to_pixels(x))
  ours = np.asarray(jax.jit(folded.logits)(images))
  options = onnxruntime.SessionOptions()
  options.add_session_config_entry('session.x64quantprecision', '1')
  runtime = onnxruntime.InferenceSession(
    onnx_graph.integer_model(folded, {}).SerializeToString(),
    options,
    providers=['CPUExecutionProvider'],
  )
  (theirs,) = runtime.run(None, {'images': images})
  bits = session_lib.bits_of(session.config)
  return {
    'arch': session.config.teacher.arch or _PROGRAM.stem,
    'bits': f'W{bits.weights}A{bits.activations}',
    'images': _IMAGES,
    'equal': int((ours == theirs).all(-1).sum()),
    'largest_difference': float(np.abs(ours - theirs).max()),
    'calibration_follows_jax': not all(np.array_equal(a, b) for a, b in leaves),
  }


# --------------------------------------------------------------------- torch


def _torch_arguments(smoke: bool) -> argparse.Namespace:
  return argparse.Namespace(
    step='joint',
    generator='slim' if smoke else 'full',
    batch_size=[24 if smoke else _TORCH_BATCH],
    seed=0,
    check=False,
  )


def torch_steps(
  group: str, pieces: list[str], folder: pathlib.Path, smoke: bool
) -> Iterator[Found]:
  """Times the joint step of `benchmarks.step_time` on one side.

  Each step is waited for, on both sides.
  """
  args = _torch_arguments(smoke)
  for piece in pieces:
    side = piece.removeprefix(f'{group}-')
    own = _jax_side if side == 'jax' else _torch_side
    yield {
      'piece': piece,
      'batch': args.batch_size[0],
      **own(args, folder, smoke),
    }


def _jax_side(args, folder: pathlib.Path, smoke: bool) -> Found:
  from benchmarks.step_time import jax_step

  step = jax_step.JaxStep(args)
  np.savez(folder / accelerator.INPUTS, **step.inputs)
  found = {1: _waited(step, 1, smoke)}
  session, count = step.session, step.session.steps_per_call
  if count > 1:
    (phase,) = (p for p in session.phases if p.name == 'joint')
    program = session.program(phase)
    arguments = session.arguments(count)

    def call():
      step.state, terms = program(step.state, *arguments)
      jax.block_until_ready(terms)

    found[count] = _waited(call, count, smoke)
  return {'ms': found}


def _torch_side(args, folder: pathlib.Path, smoke: bool) -> Found:
  if importlib.util.find_spec('torch') is None:
    return {'skipped': 'pip install torch'}
  import torch as torch_lib

  from benchmarks.step_time import torch_step

  on_gpu = torch_lib.cuda.is_available()
  if not on_gpu and not smoke:
    return {'skipped': 'torch finds no GPU'}
  torch_lib.set_default_device('cuda' if on_gpu else 'cpu')
  torch_lib.set_float32_matmul_precision('high')  # TF32, as in JAX
  arrays = dict(np.load(folder / accelerator.INPUTS))
  step = torch_step.JointStep(arrays, args.batch_size[0], 'eager', False)

  def call():
    step()
    if on_gpu:
      torch_lib.cuda.synchronize()

  name = torch_lib.cuda.get_device_name() if on_gpu else 'cpu'
  return {
    'ms': {1: _waited(call, 1, smoke)},
    'torch': torch_lib.__version__,
    'torch_device': name,
  }


def _waited(call: Callable[[], Any], steps: int, smoke: bool) -> Found:
  """Times a function that makes `steps` steps and waits for them."""
  found = []
  for _ in range(3 if smoke else 55):
    start = time.perf_counter()
    call()
    found.append(1e3 * (time.perf_counter() - start) / steps)
  return _spread(found[2 if smoke else 5 :])


_GROUPS = {'steps': steps, 'exactness': exactness, 'torch': torch_steps}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('group', help='device, exactness, torch or steps-CONFIG-DTYPE')
  add('folder', type=pathlib.Path)
  add('pieces', nargs='*')
  add('--smoke', action='store_true')
  args = parser.parse_args()
  if args.group == 'device':
    print(json.dumps(device()))
    return 0
  measure = _GROUPS[args.group.partition('-')[0]]
  for found in measure(args.group, args.pieces, args.folder, args.smoke):
    print(json.dumps(found), flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
