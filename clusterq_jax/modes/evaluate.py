"""--mode=evaluate: measures accuracy on labelled images."""

from typing import Any

import ml_collections

from clusterq_jax import config as config_lib
from clusterq_jax import precision
from clusterq_jax.deploy import student as student_lib
from clusterq_jax.errors import InputError
from clusterq_jax.runtime import bucket, evaluation
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime import workdir as workdir_lib


@precision.in_float32
@bucket.on_copy
def evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Evaluates a finished run on the images that `config.eval` describes.

  Args:
    config: config of the run; `config.eval.network` chooses what to measure.
    workdir: folder of the run.

  Returns:
    The content of results.json after the new measurements are merged.

  Raises:
    InputError: the workdir holds no finished student, or the images do not fit.
  """
  resolved = config_lib.resolve(config)
  teacher = session_lib.load_teacher(resolved)
  resolved = session_lib.complete(resolved, teacher)
  images = session_lib.load_images(resolved, teacher)
  if images is None:
    raise InputError(
      "config.eval.source='none': found no images; expected fashion_mnist, or "
      'npz, folder or tfds with config.eval.path=PATH'
    )
  networks = {'teacher': evaluation.of_teacher(teacher)}
  if resolved.eval.network != 'teacher':
    student = student_lib.load(workdir)
    networks['student'] = evaluation.of_student(student)
  if resolved.eval.network == 'integer':
    networks['deployed'] = evaluation.of_integer(student)
  with workdir_lib.open_workdir(resolved, workdir) as folder:
    results = evaluation.of_config(networks, images, resolved.eval)
    return workdir_lib.merge_results(folder, results)
