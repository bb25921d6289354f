"""--mode=export: the deployable files of a finished run."""

import dataclasses
import pathlib
from typing import Any

import ml_collections

from clusterq_jax import config as config_lib
from clusterq_jax import data, precision
from clusterq_jax.config import Config
from clusterq_jax.deploy import export_files
from clusterq_jax.deploy import student as student_lib
from clusterq_jax.deploy.student import Student
from clusterq_jax.errors import InputError
from clusterq_jax.runtime import bucket, samples
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime import workdir as workdir_lib
from clusterq_jax.weights.teacher import Teacher

_SELFTEST_IMAGES = 64


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
    InputError: no finished run, `paper` placement, or the folder exists.
  """
  resolved = config_lib.resolve(config)
  student = student_lib.load(workdir)
  student.integer()  # refuses `paper` placement before anything else
  target = workdir_lib.export_folder(resolved, workdir)
  if target.exists():
    raise InputError(
      f'{target} exists; remove it, or set config.export.folder to a new one'
    )
  teacher = session_lib.load_teacher(resolved)
  with workdir_lib.open_workdir(resolved, workdir) as run:
    written = write(resolved, student, teacher, run, target)
    return workdir_lib.merge_results(run, written)


def write(
  config: Config,
  student: Student,
  teacher: Teacher,
  run: pathlib.Path,
  target: pathlib.Path,
) -> dict[str, Any]:
  """Writes the files of a run; returns their part of results.json.

  Args:
    config: of the run.
    student: of the run, `integer` placement.
    teacher: of the run.
    run: the workdir, which holds the samples.
    target: the folder that is made or replaced.
  """
  images = data.read_npz(str(run / samples.ARRAYS)).images[:_SELFTEST_IMAGES]
  facts = {
    'bits': dataclasses.asdict(student.bits),
    'preprocessing': dataclasses.asdict(student.preprocessing),
    'class_names': student.class_names,
    'config': config_lib.to_json(config),
  }
  sizes = export_files.write(target, student, teacher, images, facts)
  return {'export': {'folder': bucket.address(target), 'bytes': sizes}}
