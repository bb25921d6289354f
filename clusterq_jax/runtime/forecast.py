"""Forecast of the accuracy that a student loses, from a run without data.

    drop = slope * KL(teacher || student) on blended synthetic images

Blended, because on images as they are the student agrees with its teacher near
100 % whatever the bits. KL, because it is of second order in how far the
student is from the teacher; so is the drop, as long as labels are about as
likely as the teacher says: answers change where it finds two classes equally
likely, and there the label is about as often the one as the other. Disagreement
is of first order.

Fitted by `benchmarks/forecast.py` on runs with real images, of few networks and
of one recipe: which ones, assets/forecast.json says. It knows nothing of other
recipes, least of all of students that were not trained on blended images; and
nothing of images unlike those that the teacher was trained on.
"""

import json
import math
from typing import Any

from clusterq_jax.data.assets import ASSETS

FILE = ASSETS / 'forecast.json'


def coefficients() -> dict[str, Any]:
  """What `benchmarks/forecast.py` wrote, and explains."""
  return json.loads(FILE.read_text())


def drop(divergence: float) -> dict[str, float] | None:
  """Forecasts teacher top-1 minus student top-1, in percentage points.

  Args:
    divergence: mean KL(teacher || student) on blended synthetic images, nats.

  Returns:
    `drop`, and the ends `low` and `high` of a 90 % interval for another network
    of the kind fitted on; None for a student further from its teacher than any
    that was fitted on.
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
