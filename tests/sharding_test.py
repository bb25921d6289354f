"""Any number of devices, one result; and who decides on several processes."""

import json
import os

import jax
import numpy as np
import pytest

from clusterq_jax import checkpoint, sharding
from clusterq_jax.errors import InputError

# --- Devices -----------------------------------------------------------------

# Prints, by dtype and number of devices, the losses of joint steps. In float32
# also of steps that all start from the state on 1 device: 'step on N'. In
# float64, too, of a run on 8 devices that goes on, from a checkpoint, on 1, and
# of one the other way round: '8 to 1' and '1 to 8'.
_ON_DEVICES = """
import json, runpy, sys
import jax, numpy as np
from jax.sharding import AxisType
from clusterq_jax import checkpoint, experiment, sharding, train
assert jax.device_count() == 8
config = runpy.run_path(sys.argv[1])['get_config']()
teacher = experiment.load_teacher(config)
devices = [8]

def make_mesh(batch_size):
  return jax.make_mesh((devices[0],), ('data',), axis_types=(AxisType.Auto,),
                       devices=jax.devices()[:devices[0]])

sharding.make_mesh = make_mesh

class Run:
  def __init__(self, n, dtype):
    devices[0] = n
    steps = experiment.make_steps(config, teacher)
    everywhere = sharding.replicated(steps.mesh)

    def cast(tree):
      return jax.tree.map(
        lambda a: a.astype(dtype) if a.dtype == np.float32 else a, tree)

    self.variables = jax.device_put(cast(teacher.variables), everywhere)
    self.key = jax.device_put(jax.random.key(7), everywhere)
    self.state = jax.jit(lambda *a: cast(steps.init(*a)),
                         out_shardings=everywhere)(self.key, self.variables)
    self.step = train.Compiler(steps.mesh)(
      steps.joint_step, self.state, self.variables, self.key, donate=True)
    self.abstract = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
      self.state)

  def __call__(self, steps):
    losses = []
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.variables, self.key)
      losses.append({k: float(v) for k, v in metrics.items()})
    return losses

one, eight = Run(1, np.float32), Run(8, np.float32)
losses = {'step on 1': [], 'step on 8': []}
for _ in range(5):
  eight.state = jax.tree.map(
    lambda a, s: jax.device_put(np.asarray(a), s.sharding),
    one.state, eight.abstract)
  losses['step on 1'] += one(1)
  losses['step on 8'] += eight(1)
# Over several steps in float64 alone. In float32 rounding grows: Adam's first
# steps are the signs of gradients, of those too that are nothing but rounding.
jax.config.update('jax_enable_x64', True)
one, eight = Run(1, np.float64), Run(8, np.float64)
losses['float64 on 1'] = one(25)
losses['float64 on 8'] = eight(25)
saved = []
for run, n in (one, 1), (eight, 8):
  store = checkpoint.Checkpoints(f'{sys.argv[2]}/{n}')
  store.save(25, run.state, 0.0)
  saved.append(store)
for n in 2, 4:
  devices[0] = n
  mesh = make_mesh(8)
  everywhere = sharding.replicated(mesh)
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
    eight.abstract)
  state, _ = saved[1].restore(abstract, print)
  jax.tree.map(np.testing.assert_array_equal, state, eight.state)
losses['float64 on 1'] += one(25)
losses['float64 on 8'] += eight(25)
one.state, _ = saved[1].restore(one.abstract, print)
losses['8 to 1'] = losses['float64 on 8'][:25] + one(25)
eight.state, _ = saved[0].restore(eight.abstract, print)
losses['1 to 8'] = losses['float64 on 1'][:25] + eight(25)
print(json.dumps(losses))
"""


def _assert_close(found, expected):
  assert len(found) == len(expected)
  for step, (a, b) in enumerate(zip(found, expected, strict=True), 1):
    assert set(a) == set(b)
    for name in ('generator/loss', 'student/loss'):
      assert a[name] == pytest.approx(float(b[name]), rel=1e-5), (step, name)


def test_eight_devices_give_the_losses_of_one(
  spawn, tiny_config_file, tmp_path
):
  process = spawn(
    '-c',
    _ON_DEVICES,
    str(tiny_config_file),
    str(tmp_path),
    JAX_PLATFORMS='cpu',
    XLA_FLAGS='--xla_force_host_platform_device_count=8',
    NPROC='16',  # of XLA's threads: fewer can all wait in a collective
  )
  out, error = process.communicate(timeout=600)
  assert process.returncode == 0, error
  losses = json.loads(out)
  assert len(losses['step on 1']) == 5
  _assert_close(losses['step on 8'], losses['step on 1'])
  one = losses['float64 on 1']
  assert len(one) == 50
  for name in ('float64 on 8', '8 to 1', '1 to 8'):
    _assert_close(losses[name], one)


# --- Processes ---------------------------------------------------------------


@pytest.fixture
def initialized(monkeypatch):
  """What jax.distributed.initialize was called with; it does nothing."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *args, **kwargs: calls.append(args)
  )
  # It would change what happens when the tests themselves are aborted.
  monkeypatch.setattr(sharding, '_speak_when_aborted', lambda: None)
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_')):
      monkeypatch.delenv(name)
  return calls


def test_off(initialized):
  assert sharding.start('off') == 'one process: --distributed=off'
  assert not initialized


@pytest.mark.parametrize('name', ['SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'])
def test_a_cluster_of_one(initialized, monkeypatch, name):
  monkeypatch.setenv(name, '1')
  assert sharding.start('auto') == f'one process: {name}=1'
  assert not initialized
  monkeypatch.setenv(name, '2')
  assert 'cluster found' in sharding.start('auto')
  assert initialized == [(None, None, None)]


def test_given_processes(initialized):
  reason = sharding.start('on', 'host:1234', 2, 1)
  assert 'given host:1234' in reason
  assert initialized == [('host:1234', 2, 1)]


def test_no_cluster(spawn):
  """In a process of its own: JAX must not have been used."""
  code = 'from clusterq_jax import sharding; print(sharding.start("auto"))'
  out, error = spawn('-c', code, JAX_PLATFORMS='cpu').communicate(timeout=120)
  assert out.startswith('one process: no cluster found'), error


@pytest.mark.parametrize('mode', ['auto', 'off'])
def test_settings_without_on(mode):
  with pytest.raises(InputError, match=f'--distributed={mode}: .*expected'):
    sharding.start(mode, 'host:1234', 2, 0)


def test_too_late():
  np.asarray(jax.numpy.zeros(1))
  with pytest.raises(InputError, match='must be called before'):
    sharding.start('on', 'localhost:1', 2, 0)


def test_refusal_is_one_line(spawn, tiny_config_file, tmp_path):
  process = spawn(
    '-m',
    'clusterq_jax.main',
    f'--config={tiny_config_file}',
    f'--workdir={tmp_path}',
    '--distributed=on',
    JAX_PLATFORMS='cpu',
  )
  _, error = process.communicate(timeout=120)
  assert process.returncode == 2
  assert error.startswith('error: --distributed=on: ')
  assert error.count('\n') == 1


@pytest.mark.parametrize(
  ('lead', 'kind', 'expected'),
  [
    (True, ValueError, InputError),
    (True, jax.errors.JaxRuntimeError, jax.errors.JaxRuntimeError),
    (False, ValueError, ValueError),
  ],
)
def test_whom_a_failed_save_blames(monkeypatch, tmp_path, lead, kind, expected):
  """The disk, but where the devices or another process must be at fault."""
  checkpoints = checkpoint.Checkpoints(str(tmp_path))

  def save(*args, **kwargs):
    raise kind('no')

  monkeypatch.setattr(checkpoints._checkpointer, 'save', save)
  monkeypatch.setattr(sharding, 'is_lead', lambda: lead)
  with pytest.raises(expected, match='no'):
    checkpoints.save(1, {'x': np.zeros(1)}, 0.0)
