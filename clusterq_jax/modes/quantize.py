"""--mode=quantize: runs from a config to a student and its results."""

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
  estimate,
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
  """Quantizes a teacher without data, or resumes an unfinished run.

  In a distributed run, every process has to call this. Only the lead evaluates,
  writes files and returns results; the others return {}.

  Args:
    config: a changed `default_config()`.
    workdir: folder of the run or gs://BUCKET/PATH; it is made if missing.

  Returns:
    The content of results.json: accuracies and agreements in percent, `wall_s`
    in seconds, `peak_rss_mb` in MB, and more. `compile_s` is how long the run
    waited for programs; `compile_total_s` is how long they compiled.

  Raises:
    InputError: the config, the weights, the images or the workdir cannot be
      used, or the loss is no longer finite.
    Preempted: the process received SIGTERM and saved its state.
  """
  began = time.monotonic()
  resolved = config_lib.resolve(config)
  session = Session(resolved)
  images = None
  if sharding.is_lead():
    images = session_lib.load_images(resolved, session.teacher)
  with (
    workdir_lib.open_workdir(session.config, workdir) as folder,
    session.compile,
  ):
    return _quantize(session, images, folder, began)


def _quantize(
  session: Session,
  images: data.Images | None,
  folder: pathlib.Path,
  began: float,
) -> dict[str, Any]:
  """Trains, saves and measures the student of a session.

  Args:
    session: session of the run.
    images: labelled images; None skips the accuracy.
    folder: the locked workdir.
    began: start of the process's work, by `time.monotonic`, in seconds.

  Returns:
    The content of results.json.
  """
  checkpoints = checkpoint.Checkpoints(bucket.address(folder / 'checkpoints'))
  restored = checkpoints.restore(session.abstract_state(), say=print)
  if restored is None:
    estimate.announce(session, 0 if images is None else len(images.labels))
  state, wall_before = restored or (_first_state(session), 0.0)

  def save(step: int, state: TrainState) -> None:
    # metrics.jsonl goes first: a resumed run needs every line up to the
    # checkpoint and drops later lines.
    bucket.upload(folder)
    checkpoints.save(step, state, wall_before + time.monotonic() - began)

  with checkpoints:
    if restored is None:
      bucket.upload(folder)
      checkpoints.save(int(state.step), state, 0.0)
    state, images_per_s = loop.train(session, state, folder, save)
    state = session.deliver(state)
    synthetic.save_samples(session, state, folder)
    held_out = synthetic.held_out(session, state)
  if not sharding.is_lead():
    return {}
  _save_student(session, state, folder / student_lib.FILE)
  student = student_lib.load(folder)
  networks = {
    'teacher': evaluation.of_teacher(session.teacher),
    'student': evaluation.of_student(student),
  }
  on_synthetic = synthetic.compare(
    held_out,
    networks['teacher'],
    networks['student'],
    session.config.eval.batch_size,
  )
  exported = {}
  is_deployable = session.config.quant.placement == 'integer'
  if is_deployable and session.config.export.after_training:
    networks['deployed'] = evaluation.of_integer(student)
    exported = export.write(
      session.config, student, session.teacher, folder, folder / 'export'
    )
  results = {
    **evaluation.of_config(networks, images, session.config.eval),
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
  """Writes student.safetensors."""
  batch_stats = session.variables['batch_stats']
  student_lib.save(
    path,
    {**state.student, 'batch_stats': batch_stats},
    session.teacher.graph,
    session_lib.bits_of(session.config),
    session.steps.networks.plan.learned,
    session.teacher.preprocessing,
    session.teacher.class_names,
  )


def _facts(session: Session, on_synthetic: dict[str, Any]) -> dict[str, Any]:
  """Returns the results that need no real images."""
  params, plan = session.variables['params'], session.steps.networks.plan
  teacher = session.teacher
  unlike = forecast.unlike(
    teacher.graph, teacher.preprocessing.image_size, teacher.num_classes
  )
  return {
    'synthetic': on_synthetic,
    'forecast': forecast.drop(on_synthetic['blended_divergence'], unlike),
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
    'compile_total_s': round(session.compile.total_seconds, 2),
    'peak_rss_mb': metrics.peak_rss_mb(),
    'devices': [d.device_kind for d in jax.devices()],
  }
