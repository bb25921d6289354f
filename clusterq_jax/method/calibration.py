"""Makes a student from the teacher's variables."""

from typing import Any

import jax

from clusterq_jax import precision
from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.method.networks import Networks
from clusterq_jax.ops.moments import batch_statistics


@precision.with_full_products
def calibrate(networks: Networks, teacher: Any, x: jax.Array) -> dict[str, Any]:
  """Sets every quantizer from images.

  With learned ranges it also rounds the weights to preserve layer outputs
  (GPTQ). It also corrects BatchNorms and biases, so that the statistics of
  their inputs match the teacher's.

  Args:
    networks: teacher and student.
    teacher: variables of the teacher.
    x: normalised images, [B, H, W, C].

  Returns:
    The student, {'params', 'quant'}.
  """
  layers = fake_quant.layer_set(
    networks.plan, calibrate=True, dtype=networks.dtype
  )
  variables = dict(teacher)
  if networks.plan.learned:
    tapped = float_layers.layer_set(tap=True, dtype=networks.dtype)
    _, taps = networks.build(tapped).apply(teacher, x, mutable=['moments'])
    variables['targets'] = {
      name: {'input': batch_statistics(own['input'])}
      for name, own in taps['moments'].items()
    }
  _, student = networks.build(layers).apply(
    variables, x, mutable=['params', 'quant']
  )
  return dict(student)
