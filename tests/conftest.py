"""Provides the fixtures that several test files use.

Whole runs use a tiny teacher, so compilation takes most of their time. All runs
share one persistent compilation cache. Most assertions share one finished run.
"""

import os
import pathlib
import runpy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from clusterq_jax import main as main_lib
from clusterq_jax import weights
from clusterq_jax.layers import float_layers
from clusterq_jax.models import registry
from clusterq_jax.models.graph import trace
from clusterq_jax.modes import quantize
from clusterq_jax.runtime import checkpoint, compilation_cache
from clusterq_jax.runtime.compiler import Compiler
from clusterq_jax.runtime.session import Session

# Runs in this process leave the user's compiled programs alone.
os.environ['JAX_COMPILATION_CACHE_DIR'] = ''
_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Compilation takes most of the tests' time. This option cuts that time by a
# third, here and in subprocesses. Tests that need the exact programs of users
# request the fixture `optimized`.
_UNOPTIMIZED = 'jax_disable_most_optimizations'
os.environ[_UNOPTIMIZED.upper()] = '1'
jax.config.update(_UNOPTIMIZED, True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks `full` tests `slow`: `-m "not slow"` replaces `-m "not full"`."""
  for item in items:
    if item.get_closest_marker('full'):
      item.add_marker('slow')


@pytest.fixture(scope='module')
def optimized() -> Iterator[None]:
  """Compiles as users do, until the end of the module."""
  os.environ[_UNOPTIMIZED.upper()] = '0'
  jax.config.update(_UNOPTIMIZED, False)
  yield
  os.environ[_UNOPTIMIZED.upper()] = '1'
  jax.config.update(_UNOPTIMIZED, True)


@pytest.fixture
def data_dir() -> pathlib.Path:
  """Returns the folder of real weights and images, or skips the test."""
  folder = os.environ.get('CLUSTERQ_TEST_DATA')
  path = pathlib.Path(folder or _REPOSITORY.parent / 'shared' / 'data')
  if not path.is_dir():
    pytest.skip(f'no real data in {path}: set CLUSTERQ_TEST_DATA to its folder')
  return path


# --- A tiny real setting -----------------------------------------------------

_CONFIG = """
from clusterq_jax import config as config_lib


def get_config():
  config = config_lib.paper_config()
  config.checkpoint_every = 2
  config.teacher.arch = 'resnet8'
  config.teacher.weights = {weights!r}
  config.quant.headroom = 0.05
  config.generator.latent_dim = 8
  config.generator.channels = (8, 8, 8)
  config.centroids.images_per_class = 16
  config.schedule.batch_size = 8
  config.loss.features = 0.5
  config.augment.adversarial = 0.01
  config.schedule.warmup_steps = 2
  config.schedule.generator_steps = 3
  config.schedule.joint_steps = 2
  config.schedule.student_steps = 3
  config.schedule.pool_batches = 2
  config.eval.batch_size = 8
  config.report.log_every = 1
  return config
"""


def _teacher_variables() -> dict[str, Any]:
  """Returns variables with statistics, gains and biases as after training."""
  network = registry.builder('resnet8', num_classes=4)(float_layers.layer_set())
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )
  random = np.random.RandomState(3)

  def value(path, leaf):
    name, shape = path[-1].key, leaf.shape
    if name == 'kernel':
      array = random.randn(*shape) * np.sqrt(2 / np.prod(shape[:-1]))
    elif name in ('scale', 'var'):
      array = random.uniform(0.5, 1.5, shape)
    else:
      array = 0.2 * random.randn(*shape)
    return array.astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(value, shapes)
  # The teacher is confident and predicts all classes equally often.
  classifier = variables['params']['classifier']
  classifier['kernel'] *= 4
  classifier['bias'] = np.array([3.4, 3.7, 2.8, -6.9], np.float32)
  return variables


@pytest.fixture(scope='session')
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Returns the weights file of a ResNet-8 on 8x8 RGB images of 4 classes."""
  path = tmp_path_factory.mktemp('teacher') / 'teacher.safetensors'
  expected = {
    'image_size': (8, 8),
    'mean': (0.5, 0.45, 0.4),
    'std': (0.25, 0.22, 0.2),
    'pixel_range': 1.0,
    'channel_order': 'rgb',
  }
  graph = trace(registry.builder('resnet8', num_classes=4))
  names = ('ant', 'bee', 'cat', 'dog')
  variables = _teacher_variables()
  weights.save(path, graph, variables, expected, names, arch='resnet8')
  return path


@pytest.fixture(scope='session')
def tiny_config_file(tiny_teacher: pathlib.Path) -> pathlib.Path:
  """Returns a config file of ten steps in all four phases."""
  path = tiny_teacher.parent / 'tiny.py'
  path.write_text(_CONFIG.format(weights=str(tiny_teacher)))
  return path


@pytest.fixture
def tiny_config(tiny_config_file: pathlib.Path) -> ml_collections.ConfigDict:
  return runpy.run_path(str(tiny_config_file))['get_config']()


# --- Running it --------------------------------------------------------------


@pytest.fixture(scope='session')
def compile_cache(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, str]]:
  """Shares compiled programs; yields the variables that subprocesses need."""
  options = {'jax_persistent_cache_min_compile_time_secs': 0}
  folder = str(tmp_path_factory.mktemp('compiled'))
  variables = {'JAX_COMPILATION_CACHE_DIR': folder}
  variables |= {name.upper(): str(value) for name, value in options.items()}
  with pytest.MonkeyPatch.context() as patch:
    for name, text in variables.items():
      patch.setenv(name, text)
    for name, value in options.items():
      jax.config.update(name, value)
    compilation_cache.enable()
    jax_cache.reset_cache()  # JAX reads these options only once
    yield variables


@pytest.fixture(scope='session')
def spawn(compile_cache: dict[str, str]) -> Callable[..., subprocess.Popen]:
  """Returns a function that starts `python ARGUMENTS` with the shared cache."""

  def start(*arguments: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
      [sys.executable, *arguments],
      cwd=_REPOSITORY,
      env={**os.environ, **compile_cache, **env},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture
def command(
  monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
  """Returns a function that runs the command line in this process.

  The function returns (exit code, stdout, stderr).
  """

  def call(*arguments: str) -> tuple[int, str, str]:
    # This process has used JAX, so it cannot join a distributed run.
    argv = ['main', '--distributed=off', *map(str, arguments)]
    # ml_collections reads overrides of config fields from sys.argv.
    monkeypatch.setattr(sys, 'argv', argv)
    capfd.readouterr()
    with flagsaver.as_parsed():
      flags.FLAGS.unparse_flags()
      code = main_lib.main(argv)
    return code, *capfd.readouterr()

  return call


@pytest.fixture(scope='session')
def finished(
  tmp_path_factory: pytest.TempPathFactory,
  tiny_config_file: pathlib.Path,
  compile_cache: dict[str, str],
) -> types.SimpleNamespace:
  """Returns a finished run; tests must not change its files.

  Attributes:
    config, workdir, results: input and output of the run.
    session: session of the run; steps, networks, teacher, variables are its.
    key: PRNG key of the steps.
    compiled: functions that the run compiled, in order.
    programs: compiled programs, by name of the function.
  """
  run, compiled = types.SimpleNamespace(programs={}), []
  run.config = runpy.run_path(str(tiny_config_file))['get_config']()
  run.workdir = tmp_path_factory.mktemp('finished') / 'run'

  class Recorder(Compiler):
    def compile(self, function, *how):
      program = super().compile(function, *how)
      compiled.append(function.__name__)
      run.programs[function.__name__] = program
      return program

  class Recorded(Session):
    def __init__(self, *args):
      super().__init__(*args)
      self.compile = Recorder(self.mesh)
      run.session = self

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quantize, 'Session', Recorded)
    run.results = quantize.quantize(run.config, str(run.workdir))
  run.compiled = tuple(compiled)
  run.steps, run.teacher = run.session.steps, run.session.teacher
  run.networks = run.steps.networks
  run.variables, run.key = run.session.step_arguments
  return run


@pytest.fixture
def state_at(finished: types.SimpleNamespace) -> Callable[..., Any]:
  """Returns a function (step, folder) that restores a checkpoint."""

  def read(step: int, workdir: pathlib.Path = finished.workdir):
    manager = checkpoint.Checkpoints(str(workdir / 'checkpoints'))
    return manager._checkpointer.load(step, finished.session.abstract_state())

  return read
