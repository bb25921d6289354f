"""Tests distributed runs: results, files, and the loss of a process.

The processes run on this machine and communicate over loopback, with XLA's CPU
collectives (Gloo).
"""

import json
import signal
import socket
import time

import jax
import pytest

_STEPS = 15
# docs/scaling.md promises two minutes. JAX notices a process that died between
# two exchanges only by its missing heartbeat, after up to 100 seconds.
_NOTICED_S = 120
_FLAGS = (
  # The learning rates of the finished run's joint phase.
  '--config.schedule.warmup_steps=0',
  '--config.schedule.generator_steps=0',
  f'--config.schedule.joint_steps={_STEPS}',
  '--config.schedule.student_steps=0',
  '--config.checkpoint_every=3',
)


# JAX requires the TPU library before it trusts GKE's variables.
_ON_GKE = """
import runpy
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
runpy.run_module('clusterq_jax.main', run_name='__main__')
"""


# Process 1 cannot read the newest of two checkpoints.
_ONE_CANNOT_READ = """
import sys
import jax
import jax.numpy as jnp
from clusterq_jax.runtime import distributed
from clusterq_jax import sharding
from clusterq_jax.runtime import checkpoint
folder, address, process = sys.argv[1:]
distributed.initialize('on', address, 2, int(process))
everywhere = sharding.replicated(sharding.make_mesh(2))
make = jax.jit(lambda x: {'x': jnp.full(3, x)}, out_shardings=everywhere)
checkpoints = checkpoint.Checkpoints(folder)
for step in 1, 2:
  checkpoints.save(step, make(step), 0.5)
if process == '1':
  load = checkpoints._checkpointer.load
  checkpoints._checkpointer.load = lambda step, abstract: (
    load(step, abstract) if step == 1 else [load(step, abstract), 1 / 0]
  )
abstract = jax.tree.map(
  lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), make(0)
)
state, wall_s = checkpoints.restore(abstract, print)
print(state['x'].tolist(), wall_s)
"""


def _free_port():
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


def _found_by(how, port, i, count):
  """Returns Python arguments and variables that connect process i."""
  if how == 'flags':
    return (
      '-m',
      'clusterq_jax.main',
      '--distributed=on',
      f'--coordinator_address=localhost:{port}',
      f'--num_processes={count}',
      f'--process_id={i}',
    ), {}
  variables = {'JAX_COORDINATOR_PORT': str(port)}
  if how == 'gke':
    return ('-c', _ON_GKE), variables | {
      'TPU_WORKER_HOSTNAMES': ','.join(['localhost'] * count),
      'TPU_WORKER_ID': str(i),
      'MEGASCALE_COORDINATOR_ADDRESS': 'localhost',
      'MEGASCALE_NUM_SLICES': '1',
      'MEGASCALE_SLICE_ID': '0',
      'TPU_SKIP_MDS_QUERY': '1',  # this machine has no metadata server
    }
  return ('-m', 'clusterq_jax.main'), variables | {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': str(count),
    'SLURM_PROCID': str(i),
    'SLURM_LOCALID': str(i),
  }


@pytest.fixture
def start(spawn, tiny_config_file, tmp_path):
  """Returns a function that starts the processes of a run."""
  started = []

  def call(how, count=2):
    port = _free_port()
    for i in range(count):
      arguments, variables = _found_by(how, port, i, count)
      process = spawn(
        *arguments,
        f'--config={tiny_config_file}',
        f'--workdir={tmp_path / "run"}',
        *_FLAGS,
        JAX_PLATFORMS='cpu',
        **variables,
      )
      started.append(process)
    return started[-count:]

  yield call
  for process in started:
    process.kill()
    process.communicate()


@pytest.fixture
def logged(tmp_path):
  """Returns a function that reads the losses logged so far, by step."""

  def read():
    file = tmp_path / 'run' / 'metrics.jsonl'
    lines = file.read_text().split('\n')[:-1] if file.exists() else []
    return {line['step']: line for line in map(json.loads, lines)}

  return read


def _wait(process, condition):
  end = time.monotonic() + 300
  while process.poll() is None and not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def _end(processes):
  """Returns the exit codes and the stderr texts of the processes."""
  said = [process.communicate(timeout=300)[1] for process in processes]
  return [process.returncode for process in processes], said


def _reference(finished):
  """Returns the losses of one process with the finished run's programs."""
  run = finished.programs
  run_keys = finished.session.keys
  train, calibration = run_keys['train'], run_keys['calibration']
  state = finished.session.init()
  # 16 images of each of 4 classes.
  keys = jax.random.split(run_keys['centroids'], 8)
  state = run['initialize_centroids'](state, finished.variables, keys)
  state = run['calibrate_student'](state, finished.variables, calibration)
  losses = []
  for _ in range(5):
    state, values = run['joint_step'](state, finished.variables, train)
    losses.append(values)
  return jax.device_get(losses)


def _assert_finished(folder, losses, finished, count):
  """Asserts that `count` processes logged every step and one run's losses."""
  assert list(losses) == list(range(1, _STEPS + 1))
  results = json.loads((folder / 'results.json').read_text())
  assert results['steps'] == _STEPS
  assert len(results['devices']) == count
  for step, expected in enumerate(_reference(finished), 1):
    for name in ('generator/loss', 'student/loss'):
      value = pytest.approx(expected[name], rel=1e-5)
      assert losses[step][name] == value, (step, name)


def _assert_told(said, message):
  """Asserts that the message is the last line that a process wrote."""
  last = said.splitlines()[-1]
  assert message in last, said
  assert 'the same command' in last


@pytest.mark.slow
def test_two_processes(start, logged, finished, tmp_path):
  """Sends SIGTERM to one process, then resumes with the same command."""
  lead, other = start('flags')
  _wait(lead, logged)
  other.send_signal(signal.SIGTERM)
  codes, said = _end((lead, other))
  assert codes == [0, 0], said
  first = max(logged())
  assert 0 < first < _STEPS
  for text in said:
    assert 'distributed: process' in text
    assert f'stopped by SIGTERM after step {first} of {_STEPS}' in text
    assert 'the same command resumes from there' in text

  codes, said = _end(start('slurm'))
  assert codes == [0, 0], said
  assert f'resuming at step {first} of {_STEPS}' in said[0]
  _assert_finished(tmp_path / 'run', logged(), finished, 2)


@pytest.mark.full
def test_killed_processes(start, logged, finished, tmp_path):
  """Kills each of two processes in turn; four processes then finish."""
  lead, other = start('slurm')
  # Until a checkpoint is there to resume from.
  _wait(lead, lambda: max(logged(), default=0) > 3)
  other.kill()
  killed_at = time.monotonic()
  codes, said = _end((lead, other))
  assert codes == [1, -9], said
  assert time.monotonic() - killed_at < _NOTICED_S
  _assert_told(said[0], 'error: process 0 of 2 stopped')
  first = max(logged(), default=0)
  assert 0 < first < _STEPS, said

  lead, other = start('flags')
  _wait(lead, lambda: max(logged(), default=0) > first)
  lead.kill()
  killed_at = time.monotonic()
  codes, said = _end((lead, other))
  assert codes == [-9, 1], said
  assert time.monotonic() - killed_at < _NOTICED_S
  _assert_told(said[1], 'error: process 1 of 2 stopped')

  processes = start('gke', 4)
  codes, said = _end(processes)
  assert codes == [0] * 4, said
  assert 'resuming at step' in said[0]
  for text in said[1:]:
    assert text.count('\n') <= 2, text  # what it is, and Gloo's own line
  _assert_finished(tmp_path / 'run', logged(), finished, 4)


@pytest.mark.slow
def test_a_checkpoint_that_one_cannot_read(spawn, tmp_path):
  address = f'localhost:{_free_port()}'
  processes = [
    spawn(
      '-c',
      _ONE_CANNOT_READ,
      str(tmp_path),
      address,
      str(i),
      JAX_PLATFORMS='cpu',
    )
    for i in range(2)
  ]
  said = [process.communicate(timeout=300) for process in processes]
  for (out, error), reason in zip(
    said, ('by another process', 'division by zero'), strict=True
  ):
    assert out.splitlines()[-2:] == [  # after a line of Gloo
      f'checkpoint 2 cannot be read and is skipped ({reason})',
      '[1, 1, 1] 0.5',
    ], error
