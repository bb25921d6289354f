"""From a finished run to the files that are deployed.

integer.onnx       the student in integers, for ONNX Runtime and OpenVINO
float32.onnx       the teacher, to compare with
integer.stablehlo  the same integer network, for `jax.export.deserialize`
student.stablehlo  the fake-quantized student, likewise
selftest.py        checks a target machine against
selftest.npz       synthetic images and the integer network's logits
"""

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.export  # not loaded by jax itself
import jax.numpy as jnp
import ml_collections
import numpy as np

from clusterq_jax import config as config_lib
from clusterq_jax import data, precision
from clusterq_jax.config import Config
from clusterq_jax.deploy import student as student_lib
from clusterq_jax.errors import InputError
from clusterq_jax.runtime import bucket, samples
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime import workdir as workdir_lib

_SELFTEST_IMAGES = 64
_PLATFORMS = ('cpu', 'cuda', 'tpu')


@precision.in_float32
@bucket.on_copy
def export(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Writes the deployable files of a finished run into a new folder.

  Args:
    config: the run's; `config.export.folder` is where, '' for WORKDIR/export.
    workdir: of the run.

  Returns:
    results.json, with `export`: the folder, and bytes by file.

  Raises:
    InputError: no finished run, `paper` placement, onnx is not installed, or
      the folder exists.
  """
  resolved = config_lib.resolve(config)
  student = student_lib.load(workdir)
  folded = student.integer()
  if importlib.util.find_spec('onnx') is None:
    raise InputError(
      "--mode=export needs the package onnx: pip install 'clusterq-jax[onnx]' "
      'or pip install onnx'
    )
  target = workdir_lib.export_folder(resolved, workdir)
  if target.exists():
    raise InputError(
      f'{target} exists; remove it, or set config.export.folder to a new one'
    )
  teacher = session_lib.load_teacher(resolved)
  with workdir_lib.open_workdir(resolved, workdir) as run:
    images = data.read_npz(str(run / samples.ARRAYS)).images[:_SELFTEST_IMAGES]

    # Imported late: optional.
    from clusterq_jax.deploy import onnx_graph as onnx_layers

    metadata = _metadata(resolved, student)
    models = {
      workdir_lib.INTEGER: onnx_layers.integer_model(folded, metadata),
      workdir_lib.FLOAT: onnx_layers.float_model(
        teacher.graph, teacher.variables, teacher.preprocessing, metadata
      ),
    }

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=f'.{target.name}-', dir=target.parent
    ) as unfinished:
      folder = pathlib.Path(unfinished) / 'export'
      folder.mkdir()
      for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString())
      shape = student.preprocessing.shape
      for name, function in (
        ('integer', folded.logits),
        ('student', student.logits),
      ):
        (folder / f'{name}.stablehlo').write_bytes(_stablehlo(function, shape))
      np.savez_compressed(
        folder / 'selftest.npz',
        images=images,
        logits=jax.jit(folded.logits)(images),
      )
      shutil.copy(data.ASSETS / 'selftest.py', folder)
      folder.rename(target)
    sizes = {f.name: f.stat().st_size for f in sorted(target.iterdir())}
    return workdir_lib.merge_results(
      run, {'export': {'folder': bucket.address(target), 'bytes': sizes}}
    )


def _metadata(config: Config, student: student_lib.Student) -> dict[str, str]:
  facts = {
    'bits': dataclasses.asdict(student.bits),
    'preprocessing': dataclasses.asdict(student.preprocessing),
    'class_names': student.class_names,
    'config': config_lib.to_json(config),
  }
  return {
    key: json.dumps(value, separators=(',', ':'))
    for key, value in facts.items()
    if value
  }


def _stablehlo(
  logits: Callable[[jax.Array], jax.Array], shape: tuple[int, int, int]
) -> bytes:
  """Serializes a program on uint8 [N, H, W, C], N free, weights included."""
  (batch,) = jax.export.symbolic_shape('N')
  images = jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)
  exported = jax.export.export(jax.jit(logits), platforms=_PLATFORMS)(images)
  return bytes(exported.serialize())
