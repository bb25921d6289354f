"""--mode=export: writes the deployable files of a finished run."""

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
    config: config of the run. `config.export.folder` names the new folder; ''
      means WORKDIR/export.
    workdir: folder of the run.

  Returns:
    The content of results.json. Its `export` holds the folder and the size of
    each file in bytes.

  Raises:
    InputError: the workdir holds no finished student, the student has `paper`
      placement, or the folder exists.
  """
  resolved = config_lib.resolve(config)
  student = student_lib.load(workdir)
  student.integer()  # refuses `paper` placement before any other work
  target = workdir_lib.export_folder(resolved, workdir)
  if target.exists():
    raise InputError(
      f'{target} exists, expected a new folder: remove it or set '
      'config.export.folder'
    )
  teacher = session_lib.load_teacher(resolved)
  resolved = session_lib.complete(resolved, teacher)
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
  """Writes the deployable files of a student.

  Args:
    config: resolved config of the run.
    student: student of the run, with `integer` placement.
    teacher: teacher of the run.
    run: folder of the run, which holds samples.npz.
    target: folder to make or to replace.

  Returns:
    The entry `export` for results.json.
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
