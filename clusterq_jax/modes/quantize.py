"""--mode=quantize: a run from config to results."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import ml_collections

from clusterq_jax import config as config_lib
from clusterq_jax import data, precision, sharding
from clusterq_jax.deploy import student as student_lib
from clusterq_jax.method.state import TrainState
from clusterq_jax.modes import export
from clusterq_jax.quant import plan as plan_lib
from clusterq_jax.runtime import (
  bucket,
  checkpoint,
  evaluation,
  forecast,
  loop,
  metrics,
  reuse,
  synthetic,
)
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime import workdir as workdir_lib
from clusterq_jax.runtime.session import Session


@precision.in_float32
@bucket.on_copy
def quantize(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Quantizes a teacher without data; resumes what the workdir holds.

  Args:
    config: from `default_config()`, changed.
    workdir: folder of the run, made when missing; or gs://BUCKET/PATH.

  Returns:
    What results.json holds: accuracies and agreements in percent, `wall_s` and
    `compile_s` in seconds, `peak_rss_mb` in MB. With several processes, all
    have to call this; only the first writes, evaluates and returns something.

  Raises:
    InputError: bad config, weights, images or workdir; or a loss that is no
      longer finite.
    Preempted: SIGTERM came; the state is saved.
  """
  began = time.monotonic()
  resolved = config_lib.resolve(config)
  session = Session(resolved)
  images = None
  if sharding.is_lead():
    images = session_lib.load_images(resolved, session.teacher)
  with workdir_lib.open_workdir(resolved, workdir) as folder:
    return _quantize(session, images, folder, began)


def _quantize(
  session: Session,
  images: data.Images | None,
  folder: pathlib.Path,
  began: float,
) -> dict[str, Any]:
  """Runs a session; began: when it started, on the monotonic clock."""
  checkpoints = checkpoint.Checkpoints(bucket.address(folder / 'checkpoints'))
  restored = checkpoints.restore(session.abstract_state(), say=print)
  state, wall_before = restored or (_first_state(session), 0.0)

  def save(step: int, state: TrainState) -> None:
    # The losses first: a run that resumes needs those before the checkpoint,
    # and drops later ones.
    bucket.upload(folder)
    checkpoints.save(step, state, wall_before + time.monotonic() - began)

  if restored is None:
    bucket.upload(folder)
    checkpoints.save(int(state.step), state, 0.0)
  state, images_per_s = loop.train(session, state, folder, save)

  state = session.deliver(state)
  synthetic.save_samples(session, state, folder)
  on_synthetic = synthetic.compare(session, state)
  if not sharding.is_lead():
    return {}
  _save_student(session, state, folder / student_lib.FILE)
  student = student_lib.load(folder)
  networks: dict[str, evaluation.Predict] = {'student': student.logits}
  exported = {}
  is_deployable = session.config.quant.placement == 'integer'
  if is_deployable and session.config.export.after_training:
    networks['deployed'] = jax.jit(student.integer().logits)
    exported = export.write(
      session.config, student, session.teacher, folder, folder / 'export'
    )
  results = {
    **evaluation.of_teacher_and(
      networks, session.teacher, images, session.config.eval
    ),
    **_facts(session, on_synthetic),
    **exported,
    'steps': int(state.step),
    'wall_s': round(wall_before + time.monotonic() - began, 2),
    'images_per_s': images_per_s,
  }
  return workdir_lib.merge_results(folder, results)


def _first_state(session: Session) -> TrainState:
  """Returns the state before this run's first step."""
  state = session.init()
  if session.config.generator.workdir:
    return reuse.take_generator(session, state)
  return state


def _save_student(
  session: Session, state: TrainState, path: pathlib.Path
) -> None:
  batch_stats = session.variables['batch_stats']
  student_lib.save(
    path,
    {**state.student, 'batch_stats': batch_stats},
    session.config.teacher.arch,
    session.teacher.options,
    session_lib.bits_of(session.config),
    session.steps.networks.plan.learned,
    session.teacher.preprocessing,
    session.teacher.class_names,
  )


def _facts(session: Session, on_synthetic: dict[str, Any]) -> dict[str, Any]:
  """Returns the part of results.json that needs no real image."""
  params, plan = session.variables['params'], session.steps.networks.plan
  return {
    'synthetic': on_synthetic,
    'forecast': forecast.drop(on_synthetic['blended_divergence']),
    'bits': {
      **dataclasses.asdict(session_lib.bits_of(session.config)),
      'input': plan_lib.WIDE_BITS,
      'classifier_input': plan_lib.WIDE_BITS,
    },
    'size': {
      'teacher_bytes': sum(4 * a.size for a in jax.tree.leaves(params)),
      'student_bytes': int(plan_lib.weight_bytes(params, plan)),
    },
    'seed': session.config.seed,
    'compile_s': round(session.compile.seconds, 2),
    'peak_rss_mb': metrics.peak_rss_mb(),
    'devices': [d.device_kind for d in jax.devices()],
  }
