"""Measures a run: features, class separation, quantization errors, latency.

The functions return numbers; page.py draws them. They intercept methods of the
layers to read inputs and outputs, so the layers do not depend on this module.

Shapes: N images, K classes, C_l channels of layer l.
"""

import importlib.util
import math
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clusterq_jax.deploy.student import Student
from clusterq_jax.layers import fake_quant, float_layers, functions
from clusterq_jax.method.centroids import RawMoments
from clusterq_jax.quant import quantizers
from clusterq_jax.weights.teacher import Teacher

_PIXELS = 2**19  # in a forward pass: 512 images of 32 x 32, 10 of 224 x 224
_TIMING_S = 1.0  # seconds of timing for each file


def batch_size(shape: Sequence[int]) -> int:
  """Returns the number of images [N, H, W, C] in a forward pass."""
  _, height, width, _ = shape
  return max(1, _PIXELS // (height * width))


def pooled_features(
  teacher: Teacher, images: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Computes the teacher's features, averaged over space.

  Class statistics use the same averages.

  Args:
    teacher: network to run.
    images: uint8 [N, H, W, C].

  Returns:
    Features by layer in forward order, [N, C_l]: the mean input of each
    BatchNorm, then the input of the classifier. The second item holds the
    predicted classes, int [N].
  """
  graph = teacher.graph
  network = teacher.build(float_layers.layer_set(tap=True))
  classifier = graph.weighted[-1]

  @jax.jit
  def forward(variables, pixels):
    seen = {}

    def note(call, args, kwargs, context):
      name = context.module.name
      if name == classifier and context.method_name == '__call__':
        seen[classifier] = functions.flatten(args[0])
      return call(*args, **kwargs)

    x = teacher.preprocessing.normalize(pixels)
    with nn.intercept_methods(note):
      logits, taps = network.apply(variables, x, mutable=['moments'])
    moments = float_layers.ordered_moments(taps, graph)
    means = {
      name: m.mean for name, m in zip(graph.batch_norms, moments, strict=True)
    }
    return means | seen, jnp.argmax(logits, -1)

  size = min(len(images), batch_size(images.shape))
  parts = []
  for start in range(0, len(images), size):
    batch = images[start : start + size]
    missing = size - len(batch)
    padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
    found = jax.device_get(forward(teacher.variables, padded))
    parts.append(jax.tree.map(lambda a: a[: len(batch)], found))  # noqa: B023
  features, answers = jax.tree.map(lambda *a: np.concatenate(a), *parts)
  # jit returns dicts with sorted keys.
  order = (*graph.batch_norms, classifier)
  return {name: features[name] for name in order}, answers


class Separation(NamedTuple):
  """Distances between classes at one layer.

  The unit is the spread within a class: the root mean square distance of an
  image to the mean of its class.

  Attributes:
    distances: Euclidean distances between the means of two classes, [K, K].
    ratio: root mean square of the distances over all pairs of classes.
  """

  distances: np.ndarray
  ratio: float


def _separation(
  mean: np.ndarray, var: np.ndarray, noise: np.ndarray
) -> Separation:
  """Computes the separation of classes from their moments.

  Args:
    mean: [K, C].
    var: variances within a class, [K, C].
    noise: variances of the error of the means, summed over channels, [K].
  """
  unit = max(float(var.sum(-1).mean()), 1e-12)
  squared = np.square(mean[:, None] - mean[None]).sum(-1) / unit
  pairs = squared[np.triu_indices(len(mean), 1)]
  # Errors of two means add to each squared distance.
  between = pairs.mean() - 2 * noise.mean() / unit
  return Separation(np.sqrt(squared), float(np.sqrt(max(between, 0.0))))


def separation_of_features(
  features: np.ndarray, labels: np.ndarray
) -> Separation:
  """Computes the separation of classes from features.

  The ratio is corrected for the sampling error of the class means.

  Args:
    features: [N, C].
    labels: int [N]. Classes with fewer than two images are ignored.

  Returns:
    The separation; `ratio` is NaN if fewer than two classes remain.
  """
  groups = [features[labels == k] for k in np.unique(labels)]
  groups = [group for group in groups if len(group) > 1]
  if len(groups) < 2:
    return Separation(np.zeros((0, 0)), math.nan)
  var = np.stack([group.var(0, ddof=1) for group in groups])
  counts = np.array([len(group) for group in groups])
  mean = np.stack([group.mean(0) for group in groups])
  return _separation(mean, var, var.sum(-1) / counts)


def separation_of_centroids(layer: RawMoments, rows: np.ndarray) -> Separation:
  """Computes the separation of centroids at one layer.

  Args:
    layer: raw moments of all classes.
    rows: classes to compare, two or more, int [K].
  """
  mean, square = (np.asarray(a)[rows] for a in (layer.mean, layer.square))
  var = np.maximum(square - np.square(mean), 0.0)
  return _separation(mean, var, np.zeros(len(rows)))


class WeightError(NamedTuple):
  """Difference between a layer's quantized weights and the teacher's.

  Attributes:
    bits: bit width.
    sqnr: signal-to-quantization-noise ratio, dB. The noise includes the changes
      by training.
    levels: share of the integer levels in use, averaged over output channels.
    clipped: share of the teacher's weights outside the range.
  """

  bits: int
  sqnr: float
  levels: float
  clipped: float


class OutputError(NamedTuple):
  """Error of a layer's output quantizer on some images.

  Attributes:
    bits: bit width.
    rounding: signal-to-quantization-noise ratio of this quantizer alone, dB.
    sqnr: the same ratio against the teacher's output, dB. The noise includes
      that of all earlier layers.
    levels: share of the integer levels in use.
    clipped: share of the values outside the range.
  """

  bits: int
  rounding: float
  sqnr: float
  levels: float
  clipped: float


def _decibel(signal: Any, noise: Any) -> float:
  """Returns the ratio of two powers in dB."""
  return 10 * float(np.log10(max(float(signal), 1e-30) / max(noise, 1e-30)))


def weight_errors(teacher: Teacher, student: Student) -> dict[str, WeightError]:
  """Measures the weight error of each layer, in forward order.

  Args:
    teacher: network that was quantized.
    student: the quantized network.
  """
  errors = {}
  for name, bits in student.plan.weights:
    float_ = np.asarray(teacher.variables['params'][name]['kernel'])
    kernel = jnp.asarray(student.variables['params'][name]['kernel'])
    grid = quantizers.weight_grid(
      student.plan, name, kernel, student.variables['quant'].get(name, {})
    )
    low, high = int(grid.low), int(grid.high)
    quantized = np.asarray(grid.quantize(kernel))
    channels = quantized.reshape(-1, quantized.shape[-1]).T
    used = np.mean([len(np.unique(channel)) for channel in channels])
    errors[name] = WeightError(
      bits=bits,
      sqnr=_decibel(np.sum(float_**2), np.sum((float_ - quantized) ** 2)),
      levels=float(used) / (high - low + 1),
      clipped=float(np.mean(np.abs(float_ / grid.step) > high + 0.5)),
    )
  return errors


def _quantizers(
  network: nn.Module, variables: Any, x: jax.Array, quantize: bool
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Runs a student and records each output quantizer.

  Args:
    network: module of the student.
    variables: variables of the student or of the teacher.
    x: normalized images, [N, H, W, C].
    quantize: whether to quantize; otherwise the network acts as the teacher.

  Returns:
    Values before and after each output quantizer, by layer.
  """
  seen = {}

  def note(call, args, kwargs, context):
    if context.method_name == 'quantize_weights' and not quantize:
      return args[0]
    if context.method_name == 'quantize_output':
      y = call(*args, **kwargs) if quantize else args[0]
      seen[context.module.name] = args[0], y
      return y
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    network.apply(variables, x)
  return seen


def output_errors(
  teacher: Teacher, student: Student, images: np.ndarray
) -> dict[str, OutputError]:
  """Measures the error of each output quantizer, in forward order.

  Args:
    teacher: network that was quantized.
    student: the quantized network.
    images: uint8 [N, H, W, C], run as one batch.
  """
  plan = student.plan
  network = teacher.build(fake_quant.layer_set(plan))

  @jax.jit
  def measure(student_variables, teacher_variables, pixels):
    x = student.preprocessing.normalize(pixels)
    ours = _quantizers(network, student_variables, x, quantize=True)
    theirs = _quantizers(network, teacher_variables, x, quantize=False)
    found = {}
    for name, output in plan.outputs:
      own = student_variables['quant'].get(name, {})
      grid = quantizers.output_grid(plan, name, own)
      assert grid is not None
      step, low, high = grid
      before, after = ours[name]
      target = theirs[name][0]
      codes = jnp.round(before / step)
      inside = (jnp.clip(codes, low, high) - low).astype(jnp.int32)
      used = jnp.bincount(inside.ravel(), length=2**output.bits) > 0
      found[name] = (
        jnp.mean(before**2),
        jnp.mean((before - after) ** 2),
        jnp.mean(target**2),
        jnp.mean((target - after) ** 2),
        jnp.mean(used),
        jnp.mean((codes < low) | (codes > high)),
      )
    return found

  found = jax.device_get(measure(student.variables, teacher.variables, images))
  errors = {}
  for name, output in plan.outputs:
    signal, rounding, target, difference, levels, clipped = found[name]
    errors[name] = OutputError(
      bits=output.bits,
      rounding=_decibel(signal, rounding),
      sqnr=_decibel(target, difference),
      levels=float(levels),
      clipped=float(clipped),
    )
  return errors


def latency(file: pathlib.Path) -> float | None:
  """Times ONNX Runtime on one thread, one image at a time.

  Args:
    file: ONNX file with uint8 images [N, H, W, C] as input.

  Returns:
    Median time of a call, seconds; None if onnxruntime is not installed.
  """
  if importlib.util.find_spec('onnxruntime') is None:
    return None
  import onnxruntime  # optional

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  session = onnxruntime.InferenceSession(
    str(file), options, providers=['CPUExecutionProvider']
  )
  _, *shape = session.get_inputs()[0].shape
  image = np.random.default_rng(0).integers(0, 256, (1, *shape), np.uint8)
  times: list[float] = []
  began = time.perf_counter()
  while len(times) < 5 or time.perf_counter() - began < _TIMING_S:
    start = time.perf_counter()
    session.run(None, {'images': image})
    times.append(time.perf_counter() - start)
  return statistics.median(times)
