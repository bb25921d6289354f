"""--mode=dryrun: compiles every step for a TPU pod, without a TPU.

    python -m clusterq_jax.main --mode=dryrun --config=NAME \
        --config.dryrun.topology=v5e:16x16

libtpu compiles for chips that the machine does not have. `runtime.roofline`
estimates memory and time of each step from the compiled program. The first
centroids are left out: their program is a loop over the forward half of a
generator step.
"""

import collections
from collections.abc import Callable

import jax
import ml_collections

from clusterq_jax import config as config_lib
from clusterq_jax import sharding
from clusterq_jax.config import Config
from clusterq_jax.method import phases as phases_lib
from clusterq_jax.runtime import metrics, roofline
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime.compiler import Compiler
from clusterq_jax.runtime.roofline import Need, Topology
from clusterq_jax.weights.teacher import Teacher


class Target:
  """Steps of a config for a TPU pod.

  Attributes:
    pod: topology to compile for.
    steps: training steps of the config.
  """

  def __init__(self, pod: Topology, config: Config, teacher: Teacher):
    """Builds the steps; nothing is compiled yet.

    Args:
      pod: topology to compile for.
      config: resolved config.
      teacher: teacher; shapes are enough as its variables.

    Raises:
      InputError: the batch does not divide among the devices of the pod.
    """
    self.pod = pod
    self.steps = session_lib.make_steps(config, teacher, pod.devices)
    everywhere = sharding.replicated(self.steps.networks.mesh)
    key, variables = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
      (jax.eval_shape(lambda: jax.random.key(0)), teacher.variables),
    )
    self._args = self.steps.abstract_state(key, variables), variables, key

  def need(self, step: Callable) -> Need | str:
    """Compiles a step and returns what it needs of each device.

    Args:
      step: method of `steps`.

    Returns:
      The resources, or the compiler's message if the step does not fit.
    """
    compile = Compiler(self.steps.networks.mesh)
    try:
      return roofline.analyse(self.pod, compile(step, *self._args, donate=True))
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      return str(e).strip().splitlines()[0]


def dryrun(config: ml_collections.ConfigDict) -> int:
  """Compiles every step of a config for a pod and prints what it needs.

  Args:
    config: config of the run; `config.dryrun.topology` names the pod.

  Returns:
    The exit code: 0 if every step fits into memory, else 1.

  Raises:
    InputError: the config, the weights or the topology cannot be used, or the
      batch does not divide among the devices.
  """
  resolved = config_lib.resolve(config)
  pod = roofline.topology(resolved.dryrun.topology)
  target = Target(pod, resolved, session_lib.load_teacher(resolved))
  s = target.steps.config.schedule
  print(
    f'{resolved.dryrun.topology}: {len(pod.devices)} devices '
    f'({pod.devices[0].device_kind}), batch {s.batch_size}. Per device:'
  )
  fits = True
  lengths = collections.Counter({'calibrate_student': 1})
  for phase in phases_lib.phases(s):
    lengths[phase.step] += phase.length
  for name, length in lengths.items():
    need = target.need(getattr(target.steps, name))
    if isinstance(need, str):
      fits = False
      print(f'{name}: does not fit: {need}')
      continue
    fits &= pod.holds(need)
    print(f'{name}\n{metrics.table(_rows(need, pod, length))}')
  return 0 if fits else 1


def _rows(need: Need, pod: Topology, length: int) -> list[tuple[str, str]]:
  """Returns the table rows of a step.

  Args:
    need: resources that the step needs.
    pod: topology.
    length: number of such steps in a run.
  """
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
