"""Estimates what a compiled step needs of a TPU, by a roofline model.

Memory, FLOPs and bytes are the compiler's figures for one device. The step time
is the longer of two times, arithmetic at peak speed and memory traffic at full
bandwidth, plus the time of the collectives, of which none is hidden.

A real step is slower. The estimate has not been compared with a real TPU.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections import Counter
from typing import Any

import jax

from clusterq_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of a TPU chip or of one of its devices.

  References:
    https://jax-ml.github.io/scaling-book/tpus

  Attributes:
    hbm: size of the memory, in bytes.
    flops: peak speed in bfloat16, in operations per second.
    bandwidth: bandwidth of the memory, in bytes per second.
    link: bandwidth of one interconnect link in one direction, in bytes per
      second.
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
_HOP_S = 1e-6  # least time of one hop between neighbours, in seconds
# Matches the result shape, the kind and the channel of a collective in HLO.
_COLLECTIVE = re.compile(
  r' = (\(.*?\)|\S+) '
  r'(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
  r'(?:-start)?\(.*?(?:channel_id=(\d+)|$)',
  re.MULTILINE,
)
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+))\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Topology:
  """A TPU slice.

  Attributes:
    kind: key of `CHIPS`, such as 'v5e'.
    chips: number of chips along each axis.
    devices: JAX's devices; a v4 chip has two.
  """

  kind: str
  chips: tuple[int, ...]
  devices: list[Any]

  @property
  def device(self) -> Chip:
    """Figures of one device: its share of a chip."""
    share = math.prod(self.chips) / len(self.devices)
    chip = CHIPS[self.kind]
    return Chip(
      chip.hbm * share,
      chip.flops * share,
      chip.bandwidth * share,
      chip.link * share,
    )

  def holds(self, need: 'Need') -> bool:
    """Tells whether a step fits into the memory of a device."""
    return need.memory <= self.device.hbm

  def collective_s(self, count: int, size: float) -> float:
    """Returns the time of collectives, as all-reduces over a torus.

    Every byte crosses the network twice. The links of all axes carry data in
    both directions at the same time.

    Args:
      count: number of collectives.
      size: bytes of all collectives together.

    Returns:
      Seconds.
    """
    if len(self.devices) == 1:
      return 0.0
    axes = [n for n in self.chips if n > 1] or [1]
    hops = count * _HOP_S * sum(n / 2 for n in axes)
    return max(hops, size / (self.device.link * len(axes)))


def topology(name: str) -> Topology:
  """Makes a topology that JAX can compile for without a TPU.

  Args:
    name: 'KIND:AxB' or 'KIND:AxBxC', such as 'v5e:16x16'.

  Raises:
    InputError: there is no such topology, or libtpu is not installed.
  """
  kind, _, shape = name.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)+', shape):
    raise InputError(
      f'config.dryrun.topology={name!r}: expected one of {", ".join(CHIPS)} '
      "and a shape, such as 'v5e:16x16' or 'v5p:4x4x4'"
    )
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(
      "--mode=dryrun needs the package libtpu: pip install 'clusterq-jax"
      "[dryrun]', in an environment of its own"
    )
  # Everything else runs on the CPU, and libtpu must not look for a TPU.
  jax.config.update('jax_platforms', 'cpu')
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # allows parallel dry runs
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-256')

  from jax.experimental import topologies  # `import jax` does not load it

  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name)
  except Exception as e:  # libtpu raises many kinds
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    raise InputError(f'config.dryrun.topology={name!r}: {reason}') from e
  return Topology(kind, tuple(map(int, shape.split('x'))), found.devices)


def collectives(program: str) -> dict[str, tuple[int, int]]:
  """Counts the collectives of a compiled program.

  A collective in a loop counts once.

  Args:
    program: HLO text of the program.

  Returns:
    (count, bytes) by kind, such as 'all-reduce'.
  """
  counts: Counter[str] = Counter()
  sizes: Counter[str] = Counter()
  channels = set()
  for shape, kind, channel in _COLLECTIVE.findall(program):
    # Parallel computations repeat the same collective, with the same channel.
    if channel in channels:
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
  """Resources of one device that a compiled step needs.

  Attributes:
    arguments: memory of the arguments, in bytes.
    temporaries: memory of temporary arrays, in bytes.
    code: memory of the program, in bytes.
    memory: memory of everything together, in bytes.
    flops: number of floating-point operations.
    traffic: bytes that move to and from memory.
    collectives: (count, bytes) by kind.
    compute_s: seconds of arithmetic at peak speed.
    traffic_s: seconds of memory traffic at full bandwidth.
    network_s: seconds of the collectives.
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
    """Bytes of all collectives."""
    return sum(size for _, size in self.collectives.values())

  @property
  def step_s(self) -> float:
    """Seconds of the step at the roofline."""
    return max(self.compute_s, self.traffic_s) + self.network_s


def memory(compiled: jax.stages.Compiled) -> int:
  """Returns the memory of a program and its arguments on a device, in bytes."""
  m: Any = compiled.memory_analysis()
  # Results share the memory of donated arguments.
  results = m.output_size_in_bytes - m.alias_size_in_bytes
  return (
    m.argument_size_in_bytes
    + results
    + m.temp_size_in_bytes
    + m.generated_code_size_in_bytes
  )


def analyse(pod: Topology, compiled: jax.stages.Compiled) -> Need:
  """Estimates what a compiled program needs of each device.

  Args:
    pod: topology that the program was compiled for.
    compiled: the program.
  """
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
