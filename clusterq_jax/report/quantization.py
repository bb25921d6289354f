"""Gathers the quantization errors of a student, layer by layer."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clusterq_jax.deploy import student as student_lib
from clusterq_jax.report import diagnostics, figures
from clusterq_jax.weights.teacher import Teacher


def gather(
  folder: pathlib.Path, teacher: Teacher, images: np.ndarray
) -> dict[str, Any]:
  """Measures a finished student against its teacher.

  Args:
    folder: workdir of the run.
    teacher: network that was quantized.
    images: synthetic images, uint8 [N, H, W, C].

  Returns:
    `images`: number of synthetic images; `charts`; and `rows` of the table.
  """
  student = student_lib.load(folder)
  # A smaller batch than usual: the outputs of all layers stay in memory.
  images = images[: max(8, diagnostics.batch_size(images.shape) // 4)]
  weights = diagnostics.weight_errors(teacher, student)
  outputs = diagnostics.output_errors(teacher, student, images)
  names = [n.name for n in teacher.graph.nodes]
  names = [name for name in names if name in weights or name in outputs]
  rows = [
    [
      f'{place}',
      name,
      *_cells(weights.get(name), 'sqnr'),
      *_cells(outputs.get(name), 'sqnr', 'rounding'),
    ]
    for place, name in enumerate(names, 1)
  ]
  charts = _error_charts(names, weights, outputs)
  return {'images': len(images), 'charts': charts, 'rows': rows}


def _cells(error: Any, *fields: str) -> list[str]:
  """Returns bits, decibels and percentages; blanks without a quantizer."""
  if error is None:
    return [''] * (len(fields) + 3)
  return [
    f'{error.bits}',
    *(f'{getattr(error, field):.1f}' for field in fields),
    f'{100 * error.levels:.1f}',
    f'{100 * error.clipped:.2f}',
  ]


def _error_charts(
  names: list[str], weights: Mapping[str, Any], outputs: Mapping[str, Any]
) -> list[str]:
  """Returns charts of the errors of weights and outputs, layer by layer."""

  x_label = 'layer number in the table'

  def curve(
    name: str, errors: Mapping[str, Any], field: str, scale: float = 1
  ) -> figures.Curve:
    values = [
      scale * getattr(errors[n], field) if n in errors else math.nan
      for n in names
    ]
    return figures.Curve(name, range(1, len(names) + 1), values)

  def shares(title: str, field: str, unit: str) -> str:
    lines = [
      curve('weights', weights, field, 100),
      curve('outputs', outputs, field, 100),
    ]
    return figures.curves(title, lines, x_label, unit, width=figures.HALF)

  ratios = [
    curve('weights', weights, 'sqnr'),
    curve('outputs', outputs, 'sqnr'),
    curve('outputs, own rounding only', outputs, 'rounding'),
  ]
  return [
    figures.curves(
      'Signal-to-quantization-noise ratio (higher is better)',
      ratios,
      x_label,
      'SQNR, dB',
      width=figures.WIDE,
    ),
    shares('Integer levels in use', 'levels', '% of the levels'),
    shares('Values outside the range', 'clipped', '% of the values'),
  ]
