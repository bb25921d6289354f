"""The measurements of a run, against values by hand."""

import dataclasses

import numpy as np
import pytest

from clusterq_jax import load_student
from clusterq_jax.layers import float_layers
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.report import diagnostics


def test_pooled_features(finished):
  teacher = finished.teacher
  images = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3), np.uint8)
  features, answers = diagnostics.pooled_features(teacher, images)
  assert list(features) == [*teacher.graph.batch_norms, 'classifier']
  classifier = teacher.variables['params']['classifier']
  logits = features['classifier'] @ classifier['kernel'] + classifier['bias']
  network = teacher.build(float_layers.layer_set())
  expected = network.apply(
    teacher.variables, teacher.preprocessing.normalize(images)
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(answers, np.argmax(expected, -1))


def test_separation():
  random = np.random.RandomState(0)
  labels = np.repeat([0, 1], 4000)
  # Two classes 3 apart, of unit variance in each of 4 dimensions: spread 2.
  features = random.randn(8000, 4) + 3 * np.eye(4)[0] * labels[:, None]
  found = diagnostics.separation_of_features(features, labels)
  assert found.ratio == pytest.approx(1.5, rel=0.03)
  assert found.distances[0, 1] == pytest.approx(1.5, rel=0.03)
  # Few images of one and the same distribution: no distance that is noise.
  ratios = [
    diagnostics.separation_of_features(random.randn(40, 4), labels[::200]).ratio
    for _ in range(200)
  ]
  assert np.mean(np.square(ratios)) < 0.05
  one = diagnostics.separation_of_features(features[:9], labels[:9])
  assert np.isnan(one.ratio)


def test_errors(finished):
  teacher, student = finished.teacher, load_student(finished.workdir)
  weights = diagnostics.weight_errors(teacher, student)
  assert list(weights) == list(teacher.graph.weighted)
  images = np.random.RandomState(0).randint(0, 256, (8, 8, 8, 3), np.uint8)
  outputs = diagnostics.output_errors(teacher, student, images)
  assert list(outputs) == [name for name, _ in student.plan.outputs]
  # The first quantizer, by hand: 8 bits, over the whole range of pixels.
  x = np.asarray(teacher.preprocessing.normalize(images))
  step = student.preprocessing.limit / 127
  codes = np.clip(np.round(x / step), -128, 127)
  noise = np.mean((x - step * codes) ** 2)
  first = outputs['input']
  expected = 10 * np.log10(np.mean(x**2) / noise)
  assert first.rounding == pytest.approx(expected, abs=0.01)
  assert first.sqnr == first.rounding
  assert first.levels == len(np.unique(codes)) / 256
  assert first.clipped == 0
  for error in outputs.values():
    assert 0 < error.levels <= 1
    assert 0 <= error.clipped < 1


def test_errors_of_a_quantizer_with_a_zero_point(finished):
  student = load_student(finished.workdir)
  name = 'stage1_block1_conv1'
  shifted = dict(student.plan.outputs)
  shifted[name] = plan_lib.Output(2, signed=True, zero_point=True)
  plan = dataclasses.replace(student.plan, outputs=tuple(shifted.items()))
  quant = dict(student.variables['quant'])
  quant[name] = {**quant[name], 'zero_point': np.float32(1)}
  variables = {**student.variables, 'quant': quant}
  student = dataclasses.replace(student, plan=plan, variables=variables)
  images = np.random.RandomState(0).randint(0, 256, (8, 8, 8, 3), np.uint8)
  found = diagnostics.output_errors(finished.teacher, student, images)
  # A ReLU gives none of the negative codes.
  assert found[name].levels == 3 / 4
