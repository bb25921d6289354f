"""Takes one network of the zoo from torch to an integer file.

`benchmarks.zoo` calls `run` in a process of its own. The student is calibrated
on procedural images that nobody optimised.
"""

import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import bit_exactness, integer_latency, runtimes
from clusterq_jax import importing
from clusterq_jax.deploy import fold, onnx_graph
from clusterq_jax.errors import InputError
from clusterq_jax.layers import fake_quant
from clusterq_jax.method import calibration, procedural
from clusterq_jax.method.networks import Networks
from clusterq_jax.models import network as network_lib
from clusterq_jax.models.preprocessing import Preprocessing
from clusterq_jax.quant import plan as plan_lib

BITS = plan_lib.Bits(8, 8, 8, 8, 'integer')
_CALIBRATION, _CHECKED, _COMPARED = 16, 8, 2  # images
# Programs that run once.
_QUICKLY: Any = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
_ROUNDS, _LATENCY_S = 20, 20.0
Stage = Iterator[dict[str, Any]]


class Job:
  """One network on its way; each stage yields what it found."""

  def __init__(self, name: str, side: int, folder: pathlib.Path):
    self.name, self.side = name, side
    self.program = folder / f'{name.replace(":", "-")}.pt2'
    self.answers = self.program.with_suffix('.npz')
    self.imported: importing.Imported
    self.prep: Preprocessing

  def export(self) -> Stage:
    """Builds the network in torch; writes its program, images and logits."""
    if self.answers.exists():
      return
    import torch

    from benchmarks import zoo_networks

    network = zoo_networks.build(self.name)
    zoo_networks.make_trained(network, self.side)
    x = zoo_networks.smooth_images(_COMPARED, self.side, seed=2)
    with torch.no_grad():
      program = torch.export.export(network, (x,))
      logits = network(x)
    self.program.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, self.program)
    logits = importing.only_tensor(logits).numpy()
    images = x.numpy().transpose(0, 2, 3, 1)
    # A process that is stopped here must not leave half a file.
    new = self.answers.with_suffix('.new.npz')
    np.savez(new, images=images, logits=logits)
    new.replace(self.answers)
    yield {'export_cpu_s': round(time.process_time(), 1)}

  def load(self) -> Stage:
    """Imports the program, from its file."""
    start = time.monotonic()
    self.imported = importing.import_program(self.program)
    yield {'import_s': round(time.monotonic() - start, 2)}
    leaves = jax.tree.leaves(self.imported.variables['params'])
    yield {
      'layers': len(self.imported.graph.nodes),
      'batch_norms': len(self.imported.graph.batch_norms),
      'weights': sum(leaf.size for leaf in leaves),
    }
    mean, std = self.imported.normalization((0.5,) * 3, (0.25,) * 3)
    self.prep = Preprocessing((self.side, self.side), mean, std)

  def parity(self) -> Stage:
    with np.load(self.answers) as file:
      images, expected = file['images'], file['logits']
    found = importing.logits(self.imported, images)
    difference = importing.difference(found, expected)
    yield {'parity': float(f'{difference:.2g}')}
    if not difference <= importing.SOUND:
      yield {'torch_rounding': self._torch_rounding(images, expected)}

  def _torch_rounding(self, images: np.ndarray, single: np.ndarray) -> float:
    """Returns how far torch's logits in float32 are from those in float64."""
    import torch

    network = torch.export.load(self.program).module().double()
    with torch.no_grad():
      double = network(torch.tensor(images.transpose(0, 3, 1, 2)).double())
    rounding = importing.difference(
      single, importing.only_tensor(double).numpy()
    )
    return float(f'{rounding:.2g}')

  def student(self) -> Stage:
    """Makes the student; says how far its logits are from the teacher's."""
    graph, variables = self.imported.graph, self.imported.variables
    # Ranges of the largest magnitudes: learned ones take minutes to compile.
    self.plan = plan_lib.make_plan(graph, BITS, False, self.prep.limit)
    build = network_lib.builder(graph)
    # Calibration uses neither generator nor devices.
    networks = Networks(
      build, graph, self.plan, None, self.prep, _CALIBRATION, None
    )
    network = build(fake_quant.layer_set(self.plan))

    @functools.partial(jax.jit, compiler_options=_QUICKLY)
    def make(teacher, key):
      x = procedural.dead_leaves(key, _CALIBRATION, self.prep.shape)
      student = calibration.calibrate(networks, teacher, x)
      student |= {'batch_stats': teacher['batch_stats']}
      logits = networks.teacher_logits(teacher, x)
      return student, logits, network.apply(student, x)

    student, wanted, found = make(variables, jax.random.key(0))
    self.variables = jax.device_get(student)
    yield {'student_error': _error(found, wanted)}

  def integer(self) -> Stage:
    graph, folder = self.imported.graph, tempfile.TemporaryDirectory()
    self.folder, files = folder, pathlib.Path(folder.name)
    folded = fold.fold(graph, self.plan, self.variables, self.prep)
    models = {
      'float32.onnx': onnx_graph.float_model(
        graph, self.imported.variables, self.prep, {}
      ),
      'integer.onnx': onnx_graph.integer_model(folded, {}),
    }
    self.runs = []
    for name, model in models.items():
      (files / name).write_bytes(model.SerializeToString())
      self.runs.append(runtimes.onnx_runtime(files / name, threads=1))
      size = round((files / name).stat().st_size / 1000)
      yield {f'{name.split(".")[0]}_kb': size}
    # Half of the images are noise, in which every value occurs.
    x = procedural.dead_leaves(
      jax.random.key(1), _CHECKED // 2, self.prep.shape
    )
    noise = np.random.RandomState(1).randint(
      0, 256, (_CHECKED // 2, *self.prep.shape), np.uint8
    )
    self.images = np.concatenate([np.asarray(self.prep.to_pixels(x)), noise])
    logits = jax.jit(folded.logits, compiler_options=_QUICKLY)
    ours = np.asarray(logits(self.images))
    # The default kernels saturate on CPUs without VNNI.
    exact = runtimes.onnx_runtime(files / 'integer.onnx', mode='1')
    given, theirs = (
      bit_exactness.in_batches(run, self.images, _CHECKED)
      for run in (self.runs[0], exact)
    )
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    yield {
      'images': _CHECKED,
      'exact': int(np.all(ours == theirs, -1).sum()),
      'answers': len(np.unique(ours, axis=0)),
      'difference': float(f'{difference:.2g}'),
      'integer_error': _error(ours, given),
    }

  def latency(self) -> Stage:
    """Compares the two files on one image and one thread, in turn."""
    image, end = self.images[:1], time.monotonic() + _LATENCY_S
    rounds = []
    while len(rounds) < _ROUNDS and (not rounds or time.monotonic() < end):
      rounds.append(
        [integer_latency.seconds(run, image, 1) for run in self.runs]
      )
    before, after = (
      1e3 * statistics.median(t) for t in zip(*rounds, strict=True)
    )
    ratio = statistics.median(a / b for a, b in rounds)
    yield {
      'float_ms': float(f'{before:.4g}'),
      'integer_ms': float(f'{after:.4g}'),
      'speedup': round(ratio, 2),
      'rounds': len(rounds),
    }


def _error(found: Any, wanted: Any) -> float:
  """Returns the error of logits, over the deviation of the right ones."""
  wanted = np.asarray(wanted, np.float64)
  error = np.sqrt(np.mean(np.square(np.asarray(found) - wanted)))
  return float(f'{error / wanted.std():.2g}')


def run(
  name: str,
  side: int,
  stages: tuple[str, ...],
  folder: pathlib.Path,
  report: pathlib.Path,
) -> None:
  """Takes a network through its stages; see `zoo.supervise`.

  Args:
    name: 'SOURCE:NAME'.
    side: height and width of the input in pixels.
    stages: methods of `Job`, in order.
    folder: where the programs that torch exports stay; only the first run
      needs torch.
    report: file to report to.
  """
  job = Job(name, side, folder)

  def say(found: dict[str, Any]) -> None:
    with report.open('a') as file:
      file.write(json.dumps(found) + '\n')

  for stage in stages:
    say({'stage': stage})
    try:
      for found in getattr(job, stage)():
        say(found | {'cpu_s': round(time.process_time(), 1)})
    except InputError as e:
      reason = str(e).removeprefix(f'{job.program}: ')
      say({'reason': reason, 'refused': True})
      return
    except Exception as e:
      say({'reason': ' '.join(f'{type(e).__name__}: {e}'.split())[:300]})
      return
