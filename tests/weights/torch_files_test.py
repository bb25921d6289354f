"""Torch checkpoints: what is read, and that nothing in them is run."""

import pickle
import sys

import numpy as np
import pytest

from clusterq_jax.weights import files
from tests.weights.states import Touch, refusal


def test_missing_torch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / 'a.th'
  path.write_bytes(b'PK')
  assert 'pip install torch' in refusal(files.read_tensors, path)


@pytest.mark.torch
def test_unsafe_torch_versions(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.th'
  torch.save({'a': torch.ones(1)}, path)
  monkeypatch.setattr(torch, '__version__', '2.5.1+cpu')
  assert '2.6 or newer' in refusal(files.read_tensors, path)


@pytest.mark.torch
@pytest.mark.parametrize('suffix', ['.th', '.pt', '.pth'])
@pytest.mark.parametrize('wrapper', ['state_dict', 'model', None])
@pytest.mark.parametrize('zipped', [True, False])
def test_torch_checkpoint(tmp_path, suffix, wrapper, zipped):
  torch = pytest.importorskip('torch')
  path = tmp_path / f'a{suffix}'
  state = {
    'module.conv1.weight': torch.ones(2).half(),
    'module.bn1.weight': torch.nn.Parameter(torch.ones(2).bfloat16()),
    'module.bn1.num_batches_tracked': torch.tensor(3),
  }
  torch.save(
    {wrapper: state, 'epoch': 3} if wrapper else state,
    path,
    _use_new_zipfile_serialization=zipped,
  )
  tensors, metadata = files.read_tensors(path)
  assert set(tensors) == {'conv1.weight', 'bn1.weight'}
  assert metadata == {}
  for value in tensors.values():
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, [1, 1])


@pytest.mark.torch
@pytest.mark.parametrize('kind', ['zip', 'legacy', 'pickle2', 'pickle5'])
def test_malicious_pickle_is_not_run(tmp_path, kind):
  torch = pytest.importorskip('torch')
  path, target = tmp_path / 'a.pt', tmp_path / 'created'
  data = {'a': torch.ones(1), 'b': Touch(target)}
  if kind.startswith('pickle'):
    path.write_bytes(pickle.dumps(Touch(target), int(kind[-1])))
  else:
    torch.save(data, path, _use_new_zipfile_serialization=kind == 'zip')
  message = refusal(files.read_tensors, path)
  assert not target.exists()
  assert 'refused, nothing was run' in message
  assert 'mkdir' in message
  # The file is a live one: an unsafe read does run it.
  if kind.startswith('pickle'):
    pickle.loads(path.read_bytes())
  else:
    torch.load(path, weights_only=False)
  assert target.exists()


@pytest.mark.torch
def test_unsupported_objects_are_named(tmp_path):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.pt'
  torch.save(torch.nn.Linear(2, 2), path)
  message = refusal(files.read_tensors, path)
  assert 'torch.nn.modules.linear.Linear' in message
  assert 'state_dict()' in message


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False])
def test_truncated_torch_file(tmp_path, zipped):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.pt'
  torch.save(
    {'a': torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped
  )
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  message = refusal(files.read_tensors, path)
  assert 'truncated' in message
  assert 'zip' in message if zipped else 'pickle' in message
  assert 'expected a torch checkpoint' in message


@pytest.mark.torch
@pytest.mark.parametrize(
  ('contents', 'found'),
  [
    (b'hello world, no checkpoint', "start with b'hello wo'"),
    (b'<!DOCTYPE html><html></html>', 'a web page'),
    (b'\x89HDF\r\n\x1a\n', 'an HDF5 file'),
  ],
)
def test_foreign_contents_under_a_torch_name(tmp_path, contents, found):
  pytest.importorskip('torch')
  path = tmp_path / 'a.pt'
  path.write_bytes(contents)
  message = refusal(files.read_tensors, path)
  assert found in message
  assert 'expected a torch checkpoint' in message


@pytest.mark.torch
def test_torch_files_that_hold_something_else(tmp_path):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.pt'
  torch.save([torch.ones(1)], path)
  assert 'found a list' in refusal(files.read_tensors, path)
  torch.save({'w': torch.ones(1), 'epoch': 3, 4: torch.ones(1)}, path)
  message = refusal(files.read_tensors, path)
  assert '2 entries are not tensors (epoch (int), 4 (Tensor))' in message
  torch.save({'w': torch.ones(2, 2).to_sparse()}, path)
  assert 'torch.sparse_coo' in refusal(files.read_tensors, path)
  torch.save({'w': torch.ones(1).expand(2**40)}, path)
  assert 'expand to 4,398,046,511,104' in refusal(files.read_tensors, path)
  torch.save({'w': torch.ones(2, device='meta')}, path)
  assert 'tensor w is' in refusal(files.read_tensors, path)
