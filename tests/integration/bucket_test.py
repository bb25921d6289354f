"""Tests runs in a bucket of a local server that emulates the cloud's."""

import http.server
import json
import socket
import time

import fsspec
import numpy as np
import pytest

import clusterq_jax

# docs/scaling.md promises two minutes. JAX notices a process that died between
# two exchanges only by its missing heartbeat, after up to 100 seconds.
_NOTICED_S = 120


def _free_port():
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


@pytest.fixture(scope='module')
def bucket():
  """Returns the file system of the bucket.

  All tests share one server, because the libraries cache its address.
  """
  with pytest.MonkeyPatch.context() as patch:
    # gcsfs reads this variable once; the server does not support the feature.
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    gcsfs = pytest.importorskip('gcsfs', reason='pip install gcsfs')
    emulator = pytest.importorskip(
      'gcp_storage_emulator.server', reason='pip install gcp-storage-emulator'
    )
    # Neither this process nor its children look for credentials.
    patch.setitem(fsspec.config.conf, 'gcs', {'token': 'anon'})
    patch.setenv('FSSPEC_GCS_TOKEN', 'anon')
    patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')  # TensorStore
    port = _free_port()
    for name in 'STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL':
      patch.setenv(name, f'http://localhost:{port}')
    # Simultaneous connections would otherwise wait for a second.
    patch.setattr(http.server.HTTPServer, 'request_queue_size', 128)
    gcsfs.GCSFileSystem.clear_instance_cache()
    with emulator.create_server(
      'localhost', port, in_memory=True, default_bucket='bucket'
    ):
      yield gcsfs.GCSFileSystem(use_listings_cache=False)
    gcsfs.GCSFileSystem.clear_instance_cache()


def _wait(process, condition):
  end = time.monotonic() + 300
  while process.poll() is None and not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def test_killed_resumed_and_evaluated(
  bucket, finished, spawn, command, tiny_config_file, tmp_path
):
  flags = f'--config={tiny_config_file}', '--workdir=gs://bucket/runs/a'
  # A killed run leaves its local copy in this folder.
  process = spawn('-m', 'clusterq_jax.main', *flags, TMPDIR=str(tmp_path))
  mark = 'bucket/runs/a/checkpoints/4/commit_success.txt'
  _wait(process, lambda: bucket.exists(mark))
  process.kill()
  _, error = process.communicate()
  assert process.returncode == -9, error
  assert not bucket.exists('bucket/runs/a/results.json')

  code, out, error = command(*flags)
  assert code == 0, error
  assert 'gs://bucket/runs/a: resuming at step' in error
  assert 'gs://bucket/runs/a: student.safetensors' in out
  for name in ('student.safetensors', 'metrics.jsonl'):
    assert (
      bucket.cat_file(f'bucket/runs/a/{name}')
      == (finished.workdir / name).read_bytes()
    ), name
  steps = bucket.ls('bucket/runs/a/checkpoints', detail=False)
  assert {name.rsplit('/', 1)[1] for name in steps} == {'8', '10'}

  images = np.random.RandomState(1).randint(0, 256, (20, 8, 8, 3), np.uint8)
  student = clusterq_jax.load_student(finished.workdir)
  labels = np.array(student.logits(images)).argmax(-1)
  np.savez(tmp_path / 'a.npz', images=images, labels=labels)
  code, _, error = command(
    *flags,
    '--mode=evaluate',
    '--config.eval.source=npz',
    f'--config.eval.path={tmp_path / "a.npz"}',
  )
  assert code == 0, error
  results = json.loads(bucket.cat_file('bucket/runs/a/results.json'))
  assert results['student']['top1'] == 100.0
  assert results['steps'] == 10

  code, _, error = command(*flags, '--mode=report')
  assert code == 0, error
  assert b'<svg' in bucket.cat_file('bucket/runs/a/report.html')


def test_several_processes(bucket, spawn, tiny_config_file, tmp_path):
  """Kills one process, then resumes with the same command."""

  def start():
    address = f'localhost:{_free_port()}'
    return [
      spawn(
        '-m',
        'clusterq_jax.main',
        '--distributed=on',
        f'--coordinator_address={address}',
        '--num_processes=2',
        f'--process_id={i}',
        f'--config={tiny_config_file}',
        '--workdir=gs://bucket/runs/b',
        # The programs are the same as in distributed_test.py, so few compile.
        '--config.schedule.warmup_steps=0',
        '--config.schedule.generator_steps=0',
        '--config.schedule.joint_steps=15',
        '--config.schedule.student_steps=0',
        '--config.checkpoint_every=3',
        JAX_PLATFORMS='cpu',
        TMPDIR=str(tmp_path),
      )
      for i in range(2)
    ]

  def end(processes):
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], said

  lead, other = start()
  mark = 'bucket/runs/b/checkpoints/3/commit_success.txt'
  _wait(lead, lambda: bucket.exists(mark))
  other.kill()
  killed_at = time.monotonic()
  codes, said = end((lead, other))
  assert codes == [1, -9], said
  assert time.monotonic() - killed_at < _NOTICED_S

  codes, said = end(start())
  assert codes == [0, 0], said
  assert 'gs://bucket/runs/b: resuming at step' in said[0]
  lines = bucket.cat_file('bucket/runs/b/metrics.jsonl').splitlines()
  assert [json.loads(line)['step'] for line in lines] == list(range(1, 16))
  results = json.loads(bucket.cat_file('bucket/runs/b/results.json'))
  assert results['steps'] == 15
  assert len(results['devices']) == 2


def test_no_such_bucket(bucket, command, tiny_config_file):
  workdir = 'gs://elsewhere/runs/a'
  code, _, error = command(
    f'--config={tiny_config_file}', f'--workdir={workdir}'
  )
  assert code == 2
  assert error.splitlines()[-1].startswith(
    f'error: {workdir}: cannot be read (FileNotFoundError'
  )
