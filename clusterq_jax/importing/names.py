"""Names of layers: legal for a Linen module, unique and readable."""

import re
from collections.abc import Sequence

from clusterq_jax.importing.layer import Layer
from clusterq_jax.models import graph_file

_LONGEST = 190  # characters; a suffix follows


def assign(layers: Sequence[Layer]) -> None:
  """Makes the names of layers legal and unique.

  Args:
    layers: in forward order; the first of a name keeps it, the second one gets
      the suffix '_2'.
  """
  taken = set(graph_file.RESERVED)
  used: dict[str, int] = {}
  for layer in layers:
    name = re.sub(r'[^\w.\-]', '_', layer.name, flags=re.ASCII)
    name = name[:_LONGEST].strip('.-') or layer.op
    if name in taken and name not in used:
      name += '_'
    base = name
    while name in taken:
      used[base] = used.get(base, 1) + 1
      name = f'{base}_{used[base]}'
    taken.add(name)
    used.setdefault(name, 1)
    layer.name = name
