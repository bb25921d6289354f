"""A run in a bucket, of a server on this machine that speaks as the cloud's."""

import json
import socket
import time

import fsspec
import numpy as np
import pytest

import clusterq_jax


@pytest.fixture
def bucket(monkeypatch):
  """The files in an empty bucket, as fsspec shows them."""
  # gcsfs looks at it once. The server does not speak what it is about.
  monkeypatch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  gcsfs = pytest.importorskip('gcsfs', reason='pip install gcsfs')
  emulator = pytest.importorskip(
    'gcp_storage_emulator.server', reason='pip install gcp-storage-emulator'
  )
  # Nobody is asked for credentials: here, and in other processes.
  monkeypatch.setitem(fsspec.config.conf, 'gcs', {'token': 'anon'})
  monkeypatch.setenv('FSSPEC_GCS_TOKEN', 'anon')
  with socket.socket() as found:
    found.bind(('localhost', 0))
    port = found.getsockname()[1]
  monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://localhost:{port}')
  gcsfs.GCSFileSystem.clear_instance_cache()
  with emulator.create_server(
    'localhost', port, in_memory=True, default_bucket='bucket'
  ):
    yield gcsfs.GCSFileSystem(use_listings_cache=False)
  gcsfs.GCSFileSystem.clear_instance_cache()


def test_killed_resumed_and_evaluated(
  bucket, finished, spawn, command, tiny_config_file, tmp_path
):
  flags = f'--config={tiny_config_file}', '--workdir=gs://bucket/runs/a'
  # A killed run leaves its copy there.
  process = spawn('-m', 'clusterq_jax.main', *flags, TMPDIR=str(tmp_path))
  end = time.monotonic() + 300
  while process.poll() is None and time.monotonic() < end:
    if bucket.exists('bucket/runs/a/checkpoints/4/_CHECKPOINT_METADATA'):
      break
    time.sleep(0.05)
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
