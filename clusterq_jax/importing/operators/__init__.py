"""What each operator of torch becomes.

A handler reads the operands of the current call and appends layers. It refuses
what no layer computes. Importing this package registers all handlers.
"""

from clusterq_jax.importing.operators import (  # noqa: F401
  activations,
  arithmetic,
  channels,
  padding,
  pools,
  shapes,
  weighted,
)
from clusterq_jax.importing.operators.registry import HANDLERS

__all__ = ['HANDLERS']
