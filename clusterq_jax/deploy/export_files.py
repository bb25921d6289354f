"""Writes the deployable files of a student into one folder.

integer.onnx       the integer network, for ONNX Runtime and OpenVINO
float32.onnx       the teacher, for comparison
integer.stablehlo  the integer network, for `jax.export.deserialize`
student.stablehlo  the fake-quantized student, for `jax.export.deserialize`
selftest.py        checks that a target machine reproduces selftest.npz
selftest.npz       synthetic images and the integer network's logits
"""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export  # `import jax` does not load it
import jax.numpy as jnp
import numpy as np

from clusterq_jax import data
from clusterq_jax.deploy import onnx_graph
from clusterq_jax.deploy.student import Student
from clusterq_jax.weights.teacher import Teacher

INTEGER, FLOAT = 'integer.onnx', 'float32.onnx'
_PLATFORMS = ('cpu', 'cuda', 'tpu')


def write(
  target: pathlib.Path,
  student: Student,
  teacher: Teacher,
  images: np.ndarray,
  facts: Mapping[str, Any],
) -> dict[str, int]:
  """Writes the files and replaces an existing folder once all are complete.

  Args:
    target: folder to make or to replace.
    student: student with `integer` placement.
    teacher: teacher of the student.
    images: images of the self-test, uint8 [N, H, W, C].
    facts: values to store as JSON in the metadata of the ONNX files.

  Returns:
    Size of each file in bytes, by name.

  Raises:
    InputError: the student has `paper` placement.
  """
  network = student.integer()
  metadata = {
    key: json.dumps(value, separators=(',', ':'))
    for key, value in facts.items()
    if value
  }
  models = {
    INTEGER: onnx_graph.integer_model(network, metadata),
    FLOAT: onnx_graph.float_model(
      teacher.graph, teacher.variables, teacher.preprocessing, metadata
    ),
  }
  programs = {
    'integer.stablehlo': network.logits,
    'student.stablehlo': student.logits,
  }
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    prefix=f'.{target.name}-', dir=target.parent
  ) as unfinished:
    folder = pathlib.Path(unfinished) / 'export'
    folder.mkdir()
    for name, model in models.items():
      (folder / name).write_bytes(model.SerializeToString())
    for name, logits in programs.items():
      program = _stablehlo(logits, student.preprocessing.shape)
      (folder / name).write_bytes(program)
    expected = jax.jit(network.logits)(images)
    np.savez_compressed(folder / 'selftest.npz', images=images, logits=expected)
    shutil.copy(data.ASSETS / 'selftest.py', folder)
    if target.exists():
      shutil.rmtree(target)
    folder.rename(target)
  return {file.name: file.stat().st_size for file in sorted(target.iterdir())}


def _stablehlo(
  logits: Callable[[jax.Array], jax.Array], shape: tuple[int, int, int]
) -> bytes:
  """Serializes a program and its weights for images of any number N.

  Args:
    logits: function from uint8 [N, H, W, C] to logits [N, K].
    shape: (H, W, C).
  """
  (batch,) = jax.export.symbolic_shape('N')
  images = jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)
  exported = jax.export.export(jax.jit(logits), platforms=_PLATFORMS)(images)
  return bytes(exported.serialize())
