"""Data parallelism: one mesh axis over every device, batches split along it.

`jit` with `NamedSharding`; statistics over a sharded batch are global because
the program is written for the whole batch. Left out, until it is tested here:
several processes.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from clusterq_jax.errors import InputError


def make_mesh(batch_size: int) -> jax.sharding.Mesh:
  """The mesh ('data',) over all devices.

  Raises:
    InputError: the batch does not divide among the devices.
  """
  devices = jax.device_count()
  if batch_size % devices:
    raise InputError(
      f'schedule.batch_size={batch_size} does not divide among {devices} '
      f'devices; expected a multiple of {devices}'
    )
  # Auto axes: under Explicit ones, one-hot einsums over a sharded batch raise.
  return jax.make_mesh(
    (devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
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
