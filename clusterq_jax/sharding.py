"""Data parallelism: one mesh axis over every device of every process.

`jit` with `NamedSharding`; statistics over a sharded batch are global because
the program is written for the whole batch, and random numbers are those of the
whole batch too. The state is replicated. Every process runs the same program on
the same numbers; the first one alone, the lead, writes files and speaks.
"""

from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from clusterq_jax.errors import InputError


def is_lead() -> bool:
  """Whether this process is the one that writes files."""
  return jax.process_index() == 0


def make_mesh(
  batch_size: int, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """The mesh ('data',) over all devices, or those given.

  Raises:
    InputError: the batch does not divide among the devices.
  """
  count = jax.device_count() if devices is None else len(devices)
  if batch_size % count:
    raise InputError(
      f'schedule.batch_size={batch_size} does not divide among {count} '
      f'devices; expected a multiple of {count}'
    )
  # Auto axes: under Explicit ones, one-hot einsums over a sharded batch raise.
  return jax.make_mesh(
    (count,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: jax.sharding.Mesh, tree):
  """Constrains arrays [B, ...] inside `jit` to be split along the batch."""
  if mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(
    tree, NamedSharding(mesh, PartitionSpec('data'))
  )
