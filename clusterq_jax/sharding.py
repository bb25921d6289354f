"""Makes the mesh and the shardings of data-parallel training.

The mesh has one axis over all devices of all processes. `jit` compiles programs
that are written for the whole batch, with `NamedSharding`. Batch statistics are
therefore global, and random numbers do not depend on the number of devices. The
state is replicated.

Every process runs the same program with the same numbers. Only the first
process, the lead, writes files and prints.
"""

from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from clusterq_jax.errors import InputError


def is_lead() -> bool:
  """Tells whether this process is the lead, which writes files."""
  return jax.process_index() == 0


def make_mesh(
  batch_size: int, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Makes a mesh with the single axis 'data'.

  Args:
    batch_size: images per step, of all devices together.
    devices: devices of the mesh; None means all devices.

  Raises:
    InputError: the batch does not divide among the devices.
  """
  count = jax.device_count() if devices is None else len(devices)
  if batch_size % count:
    raise InputError(
      f'config.schedule.batch_size={batch_size} does not divide among {count} '
      f'devices; expected a multiple of {count}'
    )
  # With Explicit axes, one-hot einsums over a sharded batch raise.
  return jax.make_mesh(
    (count,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding that copies an array to every device."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: jax.sharding.Mesh, tree):
  """Copies arrays to every device, inside `jit`.

  Args:
    mesh: mesh from `make_mesh`.
    tree: tree of arrays.
  """
  if mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def split_batch(mesh: jax.sharding.Mesh, tree):
  """Splits arrays along the batch, inside `jit`.

  Args:
    mesh: mesh from `make_mesh`.
    tree: tree of arrays [B, ...].
  """
  if mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(
    tree, NamedSharding(mesh, PartitionSpec('data'))
  )
