"""Makes a student from the teacher's variables."""

from typing import Any

import jax
import jax.numpy as jnp

from clusterq_jax.layers import fake_quant, float_layers
from clusterq_jax.method.networks import Networks
from clusterq_jax.ops.moments import batch_statistics


def uncalibrated(networks: Networks, teacher: Any) -> dict[str, Any]:
  """Returns a student with the teacher's params and zeros in `quant`.

  Args:
    networks: teacher and student.
    teacher: variables of the teacher.

  Returns:
    The student, {'params', 'quant'}, with the shapes that `calibrate` returns.
  """
  images = (networks.batch_size, *networks.generator.shape)
  shapes = jax.eval_shape(
    lambda teacher, x: calibrate(networks, teacher, x),
    teacher,
    jax.ShapeDtypeStruct(images, jnp.zeros(()).dtype),
  )
  return {
    'params': jax.tree.map(jnp.asarray, teacher['params']),
    'quant': jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), shapes['quant']
    ),
  }


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
