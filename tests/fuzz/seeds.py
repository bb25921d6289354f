"""Sound inputs that the mutations start from."""

import io
import json
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from clusterq_jax import importing, weights
from clusterq_jax.config import resolve
from clusterq_jax.deploy import student as student_lib
from clusterq_jax.models import registry
from clusterq_jax.runtime import session as session_lib
from clusterq_jax.weights import layouts, matching

try:
  import torch
except ImportError:
  torch = None

ARCH, SIDE, CLASSES = 'resnet8', 8, 4
_PROGRAMS = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'programs'
_CONFIG = """
from clusterq_jax import config as config_lib


def get_config():
  config = config_lib.paper_config()
  config.teacher.arch = 'resnet8'
  config.teacher.weights = {weights!r}
  config.generator.latent_dim = 8
  config.generator.channels = (8, 8, 8)
  config.schedule.batch_size = 8
  config.schedule.warmup_steps = 2
  config.schedule.generator_steps = 3
  config.schedule.joint_steps = 2
  config.schedule.student_steps = 3
  config.schedule.pool_batches = 2
{changes}
  return config
"""


class Seeds:
  """Sound inputs to start from, made once in each worker."""

  def __init__(self, folder: pathlib.Path):
    random = np.random.default_rng(0)
    self.teacher = folder / 'teacher.safetensors'
    metadata = {
      'format': 'clusterq-jax teacher 1',
      'arch': ARCH,
      'image_size': f'[{SIDE}, {SIDE}]',
      'mean': '[0.5, 0.45, 0.4]',
      'std': '[0.25, 0.22, 0.2]',
      'pixel_range': '1.0',
      'channel_order': 'rgb',
      'class_names': json.dumps(['ant', 'bee', 'cat', 'dog']),
    }
    registered = registry.architecture(ARCH)
    options = {'num_classes': CLASSES, 'shortcut': 'pad'}
    layers = matching.layers_of(registered, 3, **options)
    variables: dict[str, Any] = {'params': {}, 'batch_stats': {}}
    akamaster = layouts.known(ARCH)[0]
    self.state = {}
    for layer in layers:
      for leaf, shape in layer.shapes.items():
        value = random.uniform(0.5, 1, shape).astype(np.float32)
        group = variables[layouts.COLLECTIONS[leaf]]
        group.setdefault(layer.name, {})[leaf] = value
        source = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        self.state[akamaster.key(layer, leaf)] = np.ascontiguousarray(source)
    weights.write_safetensors(self.teacher, variables, metadata)
    self.safetensors = self.teacher.read_bytes()
    self.npz = _saved(np.savez, **self.state)
    self.config_file = folder / 'config.py'
    self.config_file.write_text(self.config_text(''))
    self.config = runpy.run_path(str(self.config_file))['get_config']()
    self.resolved = resolve(self.config)
    self.loaded = session_lib.load_teacher(self.resolved)
    self._write_student(folder / student_lib.FILE)
    self.student = (folder / student_lib.FILE).read_bytes()
    imported = importing.import_program(_PROGRAMS / 'release_2.13.pt2')
    importing.write(
      imported, folder / 'imported.safetensors', mean=(0.5,) * 3, std=(0.3,) * 3
    )
    self.imported = (folder / 'imported.safetensors').read_bytes()
    pixels = random.integers(0, 256, (6, SIDE, SIDE, 3), np.uint8)
    labels = np.arange(6) % CLASSES
    self.images = _saved(np.savez_compressed, images=pixels, labels=labels)
    self.programs = {
      release: (_PROGRAMS / f'release_{release}.pt2').read_bytes()
      for release in ('2.7', '2.13')
    }
    if torch is not None:
      self.torch_state = {k: torch.tensor(v) for k, v in self.state.items()}
      self.pth = {
        zipped: torch_file(self.torch_state, zipped) for zipped in (True, False)
      }

  def config_text(self, changes: str) -> str:
    return _CONFIG.format(weights=str(self.teacher), changes=changes)

  def _write_student(self, path: pathlib.Path) -> None:
    steps = session_lib.make_steps(self.resolved, self.loaded)
    state = jax.eval_shape(steps.init, jax.random.key(0), self.loaded.variables)
    student = jax.tree.map(
      lambda s: np.full(s.shape, 0.5, s.dtype), state.student
    )
    student_lib.save(
      path,
      {**student, 'batch_stats': self.loaded.variables['batch_stats']},
      self.loaded.graph,
      session_lib.bits_of(self.resolved),
      steps.networks.plan.learned,
      self.loaded.preprocessing,
      self.loaded.class_names,
    )


def _saved(save: Callable, **arrays: np.ndarray) -> bytes:
  out = io.BytesIO()
  save(out, **arrays)
  return out.getvalue()


def torch_file(state: Any, zipped: bool) -> bytes:
  out = io.BytesIO()
  torch.save(state, out, _use_new_zipfile_serialization=zipped)
  return out.getvalue()
