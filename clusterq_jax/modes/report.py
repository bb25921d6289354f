"""--mode=report: writes an HTML page about a run and TensorBoard events."""

import importlib.util
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from clusterq_jax import config as config_lib
from clusterq_jax import data, precision
from clusterq_jax.atomic import atomic
from clusterq_jax.data import image_files
from clusterq_jax.errors import InputError
from clusterq_jax.method.state import TrainState
from clusterq_jax.report import tensorboard
from clusterq_jax.runtime import bucket, checkpoint, metrics
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.runtime import workdir as workdir_lib
from clusterq_jax.runtime.session import Session

_SMALL = 64 * 64  # pixels of an image; more images of at most this size
# Smallest share of a synthetic batch that the shown classes take. The batch
# statistics of the generator would differ if a few of 1,000 classes took all.
_LEAST_SHARE = 0.25


@precision.in_float32
@bucket.on_copy
def report(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Writes report.html and event files into the workdir of a run.

  It changes nothing else in the workdir.

  Args:
    config: config of the run; `config.eval` names real images for comparison.
    workdir: folder of the run, which may be unfinished.

  Returns:
    The content of results.json with `report`, which tells whether there are
    `events`. An unfinished run adds `unfinished`, its progress as text.

  Raises:
    InputError: a package is missing, there are several processes, the workdir
      holds no run or one with another config, or the images do not fit.
  """
  resolved = config_lib.resolve(config)
  for package in ('matplotlib', 'jinja2'):
    if importlib.util.find_spec(package) is None:
      raise InputError(
        f'--mode=report needs the package {package}: pip install '
        "'clusterq-jax[report]'"
      )
  from clusterq_jax.report import page  # its packages are optional

  if jax.process_count() > 1:
    raise InputError(
      f'--mode=report: found {jax.process_count()} processes, expected 1; add '
      '--distributed=off'
    )
  if not (pathlib.Path(workdir) / 'config.json').exists():
    raise InputError(f'{workdir}: no run; expected config.json')
  session = Session(resolved)
  real = session_lib.load_images(resolved, session.teacher)
  shown = np.arange(min(session.teacher.num_classes, page.MOST_CLASSES))
  with workdir_lib.open_workdir(session.config, workdir) as folder:
    state = _newest_state(folder, session)
    images = {
      kind: page.Images(*found)
      for kind, found in _images(session, state, real, shown).items()
    }
    lines = metrics.read(folder / 'metrics.jsonl')
    results = workdir_lib.read_results(folder)
    written = tensorboard.write_events(folder / 'tensorboard', lines, results)
    results['report'] = {'events': written}
    if 'steps' not in results:
      done = 0 if state is None else int(state.step)
      total = session.phases[-1].end
      results['unfinished'] = f'step {done} of {total}'
    run = page.Run(session, folder, state, results, lines, shown, images)
    with atomic(folder / 'report.html') as temporary:
      temporary.write_text(page.render(run), encoding='utf-8')
  return results


def _newest_state(folder: pathlib.Path, session: Session) -> TrainState | None:
  """Returns the state of the newest checkpoint; None without a checkpoint."""
  checkpoints = bucket.address(folder / 'checkpoints')
  if not epath.Path(checkpoints).exists():
    return None
  restored = checkpoint.Checkpoints(checkpoints).restore(
    session.abstract_state(), print
  )
  return restored[0] if restored else None


_Labelled = tuple[np.ndarray, np.ndarray]  # uint8 [N, H, W, C]; classes [N]


def _images(
  session: Session,
  state: TrainState | None,
  real: data.Images | None,
  shown: np.ndarray,
) -> dict[str, _Labelled]:
  """Returns images of the shown classes, 'synthetic' before 'real'."""
  height, width, _ = session.teacher.preprocessing.shape
  per_class = 40 if height * width <= _SMALL else 8
  images = {}
  if state is not None:
    images['synthetic'] = _synthetic(session, state, shown, per_class)
  if real is not None:
    found = _real(real, shown, per_class)
    if found is not None:
      images['real'] = found
  return images


def _synthetic(
  session: Session, state: TrainState, shown: np.ndarray, per_class: int
) -> _Labelled:
  """Returns new images of the newest generator and their classes.

  Args:
    session: session of the run.
    state: holds the generator.
    shown: classes to draw, which take turns.
    per_class: images of each class.
  """
  networks, seed = session.steps.networks, session.config.seed
  random = np.random.RandomState(seed)
  others = np.setdiff1d(np.arange(networks.num_classes), shown)
  share = max(len(shown) / networks.num_classes, _LEAST_SHARE)
  count = max(1, round(share * networks.batch_size))  # kept images of a batch
  wanted = np.tile(shown, per_class)
  generate = jax.jit(networks.generate)
  parts = []
  for i, start in enumerate(range(0, len(wanted), count)):
    labels = np.resize(wanted[start : start + count], count)
    if len(others):
      rest = random.choice(others, networks.batch_size - count)
      labels = np.concatenate([labels, rest])
    x, _ = generate(state.generator, jax.random.key(seed + i), labels)
    pixels = networks.preprocessing.to_pixels(jax.device_get(x[:count]))
    parts.append(np.asarray(pixels))
  return np.concatenate(parts)[: len(wanted)], wanted


def _real(
  real: data.Images, shown: np.ndarray, per_class: int
) -> _Labelled | None:
  """Returns the first images of each class; None if all are unreadable.

  Args:
    real: labelled images.
    shown: classes to take.
    per_class: largest number of images of a class.
  """
  rows = np.concatenate(
    [np.flatnonzero(real.labels == k)[:per_class] for k in shown]
  )
  found = [real.images[row : row + 1] for row in rows]
  if isinstance(real.images, image_files.ImageFiles):
    readable = [row not in real.images.broken for row in rows]
    found = [image for image, good in zip(found, readable, strict=True) if good]
    rows = rows[readable]
  if not found:
    return None
  return np.concatenate(found), real.labels[rows]
