"""Makes a student from the teacher's parameters and some images."""

from typing import Any

import jax

from clusterq_jax.layers import fake_quant
from clusterq_jax.method.networks import Networks
from clusterq_jax.ops.moments import batch_statistics


def calibrate(networks: Networks, teacher: Any, x: jax.Array) -> dict[str, Any]:
  """Sets every quantizer from images.

  With learned ranges it also rounds the weights to preserve layer outputs
  (GPTQ) and corrects BatchNorm so that its input statistics match the
  teacher's.

  Args:
    networks: teacher and student.
    teacher: its variables.
    x: normalised images, [B, H, W, C].

  Returns:
    The student, {'params', 'quant'}.
  """
  layers = fake_quant.layer_set(
    networks.plan, calibrate=True, dtype=networks.dtype
  )
  variables = dict(teacher)
  if networks.plan.learned:
    _, moments = networks.teach(teacher, x)
    found = [batch_statistics(m) for m in moments]
    names = networks.graph.batch_norms
    variables['targets'] = {
      name: {'input': target} for name, target in zip(names, found, strict=True)
    }
  _, student = networks.build(layers).apply(
    variables, x, mutable=['params', 'quant']
  )
  return dict(student)
