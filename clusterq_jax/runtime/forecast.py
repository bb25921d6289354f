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
"""

import json
import math
from typing import Any

from clusterq_jax.data.assets import ASSETS

FILE = ASSETS / 'forecast.json'


def coefficients() -> dict[str, Any]:
  """Returns the coefficients that `benchmarks/forecast.py` wrote."""
  return json.loads(FILE.read_text())


def drop(divergence: float) -> dict[str, float] | None:
  """Forecasts teacher top-1 minus student top-1, in percentage points.

  Args:
    divergence: mean KL(teacher || student) on blended synthetic images, in
      nats.

  Returns:
    `drop` and the ends `low` and `high` of a 90 % interval, in percentage
    points. The interval is for a new network of the kind that was fitted. The
    result is None if the divergence exceeds all that were fitted.
  """
  c = coefficients()
  if not divergence <= c['largest_divergence']:
    return None
  estimate = c['slope'] * divergence
  margin = c['margin'] * math.sqrt(divergence)
  return {
    'drop': round(estimate, 2),
    'low': round(estimate / c['factor'] - margin, 2),
    'high': round(estimate * c['factor'] + margin, 2),
  }
