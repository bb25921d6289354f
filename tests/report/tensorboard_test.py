"""Event files for TensorBoard."""

import struct

import pytest

from clusterq_jax.report import tensorboard


def test_events(tmp_path):
  pytest.importorskip('tensorboardX')
  from tensorboardX.proto import event_pb2

  lines = [
    {'step': 2, 'generator/loss': 0.5},
    {'step': 4, 'generator/loss': 0.25, 'student/loss': 3.0},
  ]
  results = {
    'steps': 10,
    'teacher': {'top1': None},
    'student': {'top1': 90.0, 'n': 8},
    'synthetic': {'agreement': 99.0},
  }
  folder = tmp_path / 'tensorboard'
  for _ in range(2):  # the second file replaces the first
    assert tensorboard.write_events(folder, lines, results)
  (file,) = folder.iterdir()
  records, found = file.read_bytes(), {}
  while records:  # length, its checksum, event, its checksum
    (length,) = struct.unpack('<Q', records[:8])
    event = event_pb2.Event.FromString(records[12 : 12 + length])
    records = records[16 + length :]
    for value in event.summary.value:
      found[event.step, value.tag] = value.simple_value
  assert found == {
    (2, 'generator/loss'): 0.5,
    (4, 'generator/loss'): 0.25,
    (4, 'student/loss'): 3.0,
    (10, 'results/student/top1'): 90.0,
    (10, 'results/synthetic/agreement'): 99.0,
  }


def test_nothing_is_written_without_the_package(tmp_path, monkeypatch):
  monkeypatch.setattr(tensorboard.importlib.util, 'find_spec', lambda _: None)
  assert not tensorboard.write_events(tmp_path / 'events', [], {})
  assert not list(tmp_path.iterdir())
