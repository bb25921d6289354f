"""What a TPU pod would do: every step compiled for it, without a TPU.

    python -m clusterq_jax.main --mode=dryrun --config=configs/NAME.py \
        --config.dryrun.topology=v5e:16x16

libtpu compiles for chips that are not there. Memory, FLOPs and bytes are the
compiler's own figures for one device. The time is a roofline: the longest of
arithmetic at the peak and of memory traffic at full bandwidth, and after it the
collectives, none of it hidden. A real step is slower; it has not been compared
with one. Left out: the start of the centroids, which is the forward half of a
generator step, in a loop.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.config import Config
from clusterq_jax.errors import InputError
from clusterq_jax.method import phases as phases_lib
from clusterq_jax.runtime import metrics
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime.compiler import Compiler
from clusterq_jax.weights.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip; https://jax-ml.github.io/scaling-book/tpus.

  Attributes:
    hbm: bytes.
    flops: per second, bfloat16.
    bandwidth: of the HBM, bytes per second.
    link: of the interconnect, bytes per second, one link, one way.
  """

  hbm: float
  flops: float
  bandwidth: float
  link: float


CHIPS = {
  'v4': Chip(32 * 2**30, 2.75e14, 1.2e12, 4.5e10),
  'v5e': Chip(16 * 2**30, 1.97e14, 8.1e11, 4.5e10),
  'v5p': Chip(95 * 2**30, 4.59e14, 2.8e12, 9.0e10),
  'v6e': Chip(32 * 2**30, 9.20e14, 1.6e12, 9.0e10),
}
_HOP_S = 1e-6  # what one hop between neighbours takes at least
_COLLECTIVE = re.compile(
  r' = (\(.*?\)|\S+) '
  r'(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
  r'(?:-start)?\(.*?(?:channel_id=(\d+)|$)',
  re.MULTILINE,
)
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+))\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Topology:
  """chips: along each axis; devices: how many JAX sees (v4: two per chip)."""

  kind: str
  chips: tuple[int, ...]
  devices: list[Any]

  @property
  def device(self) -> Chip:
    """A device's share of its chip."""
    share = math.prod(self.chips) / len(self.devices)
    chip = CHIPS[self.kind]
    return Chip(
      chip.hbm * share,
      chip.flops * share,
      chip.bandwidth * share,
      chip.link * share,
    )

  def holds(self, need: 'Need') -> bool:
    """Whether a device has the memory that a step needs."""
    return need.memory <= self.device.hbm

  def collective_s(self, count: int, size: float) -> float:
    """Seconds for `count` collectives that move `size` bytes together.

    As all-reduces over a torus: every byte crosses twice, both ways on every
    axis at once.
    """
    if len(self.devices) == 1:
      return 0.0
    axes = [n for n in self.chips if n > 1] or [1]
    hops = count * _HOP_S * sum(n / 2 for n in axes)
    return max(hops, size / (self.device.link * len(axes)))


def topology(name: str) -> Topology:
  """The topology 'KIND:AxB' or 'KIND:AxBxC'.

  Raises:
    InputError: no such topology, or libtpu is not installed.
  """
  kind, _, shape = name.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)+', shape):
    raise InputError(
      f'config.dryrun.topology={name!r}: expected one of {", ".join(CHIPS)}, '
      "and a shape: 'v5e:16x16', 'v5p:4x4x4'"
    )
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(
      "--mode=dryrun needs the package libtpu: pip install 'clusterq-jax"
      "[dryrun]', in an environment of its own"
    )
  # The rest runs on this machine's CPU, and nobody is asked for a TPU.
  jax.config.update('jax_platforms', 'cpu')
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # two dry runs at once
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-256')

  # Imported late: not part of jax itself.
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name)
  except Exception as e:  # libtpu raises many kinds
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    raise InputError(f'config.dryrun.topology={name!r}: {reason}') from e
  return Topology(kind, tuple(map(int, shape.split('x'))), found.devices)


def collectives(program: str) -> dict[str, tuple[int, int]]:
  """Of a compiled program's text: how many there are, and bytes, by kind.

  Those in a loop count once.
  """
  counts: Counter[str] = Counter()
  sizes: Counter[str] = Counter()
  channels = set()
  for shape, kind, channel in _COLLECTIVE.findall(program):
    if channel in channels:  # one that runs beside others is written in each
      continue
    if channel:
      channels.add(channel)
    counts[kind] += 1
    for _, bits, dimensions in _ARRAY.findall(shape):
      elements = math.prod(map(int, dimensions.split(','))) if dimensions else 1
      sizes[kind] += elements * max(int(bits or 8) // 8, 1)
  return {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)}


@dataclasses.dataclass(frozen=True)
class Need:
  """What a compiled step needs of one device.

  Attributes:
    arguments, temporaries, code: bytes.
    memory: bytes, of all together.
    flops: floating-point operations.
    traffic: bytes to and from memory.
    collectives: count and bytes by kind.
    compute_s, traffic_s, network_s: seconds at the roofline.
  """

  arguments: int
  temporaries: int
  code: int
  memory: int
  flops: float
  traffic: float
  collectives: dict[str, tuple[int, int]]
  compute_s: float
  traffic_s: float
  network_s: float

  @property
  def network_bytes(self) -> int:
    return sum(size for _, size in self.collectives.values())

  @property
  def step_s(self) -> float:
    return max(self.compute_s, self.traffic_s) + self.network_s


def memory(compiled: jax.stages.Compiled) -> int:
  """Bytes that a program takes of a device, its arguments included."""
  m: Any = compiled.memory_analysis()
  # Donated arguments and results share their memory.
  results = m.output_size_in_bytes - m.alias_size_in_bytes
  return (
    m.argument_size_in_bytes
    + results
    + m.temp_size_in_bytes
    + m.generated_code_size_in_bytes
  )


def analyse(pod: Topology, compiled: jax.stages.Compiled) -> Need:
  """What a program that was compiled for the pod needs."""
  device = pod.device
  parts: Any = compiled.memory_analysis()
  cost: Any = compiled.cost_analysis()
  found = collectives(compiled.as_text() or '')
  return Need(
    arguments=parts.argument_size_in_bytes,
    temporaries=parts.temp_size_in_bytes,
    code=parts.generated_code_size_in_bytes,
    memory=memory(compiled),
    flops=cost['flops'],
    traffic=cost['bytes accessed'],
    collectives=found,
    compute_s=cost['flops'] / device.flops,
    traffic_s=cost['bytes accessed'] / device.bandwidth,
    network_s=pod.collective_s(
      sum(count for count, _ in found.values()),
      sum(size for _, size in found.values()),
    ),
  )


class Target:
  """The steps of a config, for a pod; nothing is compiled yet.

  Raises:
    InputError: a batch that does not divide among the pod's devices.
  """

  def __init__(self, pod: Topology, config: Config, teacher: Teacher):
    self.pod = pod
    self.steps = session_lib.make_steps(config, teacher, pod.devices)
    everywhere = sharding.replicated(self.steps.networks.mesh)
    key, variables = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
      (jax.eval_shape(lambda: jax.random.key(0)), teacher.variables),
    )
    self._args = self.steps.abstract_state(key, variables), variables, key

  def need(self, step: Callable) -> Need | str:
    """Compiles one of `steps`; where it does not fit, the compiler's reason."""
    compile = Compiler(self.steps.networks.mesh)
    try:
      return analyse(self.pod, compile(step, *self._args, donate=True))
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      return str(e).strip().splitlines()[0]


def dryrun(config: ml_collections.ConfigDict) -> int:
  """Compiles every step of a config for a pod and prints what it needs.

  Args:
    config: the run's; `config.dryrun.topology` is the pod.

  Returns:
    The exit code: 0, or 1 where a step does not fit.

  Raises:
    InputError: bad config, weights or topology; a batch that does not divide.
  """
  resolved = config_lib.resolve(config)
  pod = topology(resolved.dryrun.topology)
  target = Target(pod, resolved, session_lib.load_teacher(resolved))
  s = resolved.schedule
  print(
    f'{resolved.dryrun.topology}: {len(pod.devices)} devices '
    f'({pod.devices[0].device_kind}), batch {s.batch_size}. Per device:'
  )
  fits = True
  programs = [(target.steps.calibrate_student, 1)]
  programs += [
    (getattr(target.steps, phase.step), phase.length)
    for phase in phases_lib.phases(s)
  ]
  for step, length in programs:
    need = target.need(step)
    if isinstance(need, str):
      fits = False
      print(f'{step.__name__}: does not fit: {need}')
      continue
    fits &= pod.holds(need)
    print(f'{step.__name__}\n{metrics.table(_rows(need, pod, length))}')
  return 0 if fits else 1


def _rows(need: Need, pod: Topology, length: int) -> list[tuple[str, str]]:
  """What a step needs, and whether the device has it; length: in steps."""
  fits = 'fits' if pod.holds(need) else 'does NOT fit'
  return [
    (
      'memory',
      f'{need.memory / 1e6:.1f} MB of {pod.device.hbm / 1e6:.0f} MB: {fits} '
      f'(arguments {need.arguments / 1e6:.1f}, temporaries '
      f'{need.temporaries / 1e6:.1f}, code {need.code / 1e6:.1f})',
    ),
    (
      'work',
      f'{need.flops / 1e9:.2f} GFLOP, {need.traffic / 1e6:.1f} MB to and from '
      'memory',
    ),
    *(
      (kind, f'{size / 1e6:.3f} MB in {count}')
      for kind, (count, size) in need.collectives.items()
    ),
    (
      'step',
      f'{1e3 * need.step_s:.3f} ms at the roofline (arithmetic '
      f'{1e3 * need.compute_s:.3f}, memory {1e3 * need.traffic_s:.3f}, network '
      f'{1e3 * need.network_s:.3f}); {length} steps '
      f'{length * need.step_s:.0f} s',
    ),
  ]
