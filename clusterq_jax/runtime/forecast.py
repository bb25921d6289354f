"""Forecasts a student's loss of accuracy without real images.

    drop = slope * KL(teacher || student) on blended synthetic images

The images are blended because on unblended ones the student agrees with its
teacher on nearly 100 %, at any bit width.

The measure is KL because it is of second order in the distance between student
and teacher, and so is the drop. A small distance changes only answers for which
the teacher finds two classes about equally likely. If the teacher is
calibrated, each of the two is then the label about equally often. Disagreement
is of first order, so it is no measure of the drop.

`benchmarks/forecast.py` fits the coefficients to runs with real images.
assets/forecast.json names their networks and their recipe. The forecast does
not hold for other recipes, above all not for students trained without blended
images. It does not hold either for images unlike the teacher's training images.
`unlike` tells what a network has that none of the fitted networks has.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from clusterq_jax.data.assets import ASSETS
from clusterq_jax.models.graph import Graph

FILE = ASSETS / 'forecast.json'
# What the networks in the file consist of, besides layers that only move
# values, and the ranges of their image sides and class counts.
_LAYERS = frozenset(
  ('input', 'conv_bn', 'add', 'avg_pool', 'global_avg_pool', 'dense')
)
_ACTIVATIONS = frozenset((None, 'relu', 'relu6'))
_SIDES = 28, 224
_CLASSES = 10, 1000


def coefficients() -> dict[str, Any]:
  """Returns the coefficients that `benchmarks/forecast.py` wrote."""
  return json.loads(FILE.read_text())


def unlike(
  graph: Graph, image_size: tuple[int, int], num_classes: int
) -> list[str]:
  """Returns what a network has that no network of the fit has, as words.

  Args:
    graph: the network.
    image_size: (H, W) in pixels.
    num_classes: number of classes.
  """
  found = {n.op for n in graph.nodes if not n.moves and n.op != 'act'} - _LAYERS
  found |= {n.act for n in graph.nodes if n.act} - _ACTIVATIONS
  words = sorted(found)
  if not _SIDES[0] <= math.sqrt(math.prod(image_size)) <= _SIDES[1]:
    words.append(f'{image_size[0]}x{image_size[1]} pixels')
  if not _CLASSES[0] <= num_classes <= _CLASSES[1]:
    words.append(f'{num_classes} classes')
  return words


def drop(
  divergence: float, unlike: Sequence[str] = ()
) -> dict[str, Any] | None:
  """Forecasts teacher top-1 minus student top-1, in percentage points.

  Args:
    divergence: mean KL(teacher || student) on blended synthetic images, in
      nats.
    unlike: what the function `unlike` finds in the network.

  Returns:
    `drop` and the ends `low` and `high` of a 90 % interval, in percentage
    points, and `unlike` if there is any. The interval is for a new network of
    the kind that was fitted. The result is None if the divergence exceeds all
    that were fitted.
  """
  c = coefficients()
  if not divergence <= c['largest_divergence']:
    return None
  estimate = c['slope'] * divergence
  margin = c['margin'] * math.sqrt(divergence)
  found = {
    'drop': round(estimate, 2),
    'low': round(estimate / c['factor'] - margin, 2),
    'high': round(estimate * c['factor'] + margin, 2),
  }
  return {**found, 'unlike': list(unlike)} if unlike else found
