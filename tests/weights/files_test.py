"""Weight files: what is read, what is refused, and in which words."""

import os

import ml_dtypes
import numpy as np
import pytest

from clusterq_jax.errors import InputError
from clusterq_jax.weights import files
from tests.weights.states import Touch, akamaster, refusal, save


def test_float_types_become_float32(weights):
  value = np.array([1.5, -2.25])
  kinds = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
  state = {f'k{n}': value.astype(kind) for n, kind in enumerate(kinds)}
  state['n'] = np.arange(3)
  tensors, metadata = files.read_tensors(save(weights, state))
  assert metadata == {}
  assert tensors['n'].dtype == np.int64
  for n in range(len(kinds)):
    assert tensors[f'k{n}'].dtype == np.float32
    np.testing.assert_array_equal(tensors[f'k{n}'], value)


def test_float8_is_refused(weights):
  state = {'a': np.ones(2, ml_dtypes.float8_e4m3fn)}
  message = refusal(files.read_tensors, save(weights, state))
  assert 'tensor a has type F8_E4M3' in message


def test_module_prefix_and_counters(weights):
  one = np.ones(1, np.float32)
  state = {'module.a': one, 'module.b.num_batches_tracked': np.array(1)}
  assert list(files.read_tensors(save(weights, state))[0]) == ['a']
  # A prefix of some keys only belongs to their names.
  state = {'module.a': one, 'a': one}
  tensors = files.read_tensors(save(weights, state))[0]
  assert set(tensors) == {'module.a', 'a'}


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite(weights, bad):
  state = {'fine': np.ones(2), 'bad': np.array([bad, 1.0, bad])}
  message = refusal(files.read_tensors, save(weights, state))
  assert 'tensor bad has 2 NaN or infinite value(s) of 3' in message


def test_names_cannot_break_the_line(weights):
  state = {'a\nb\x1b[31m': np.array([np.nan])}
  message = refusal(files.read_tensors, save(weights, state))
  assert r'a\nb\x1b[31m' in message


@pytest.mark.parametrize(
  ('name', 'contents', 'found'),
  [
    ('absent.safetensors', None, 'No such file'),
    ('a.safetensors', b'', 'an empty file (0 bytes)'),
    ('a.pt', b'', 'an empty file (0 bytes)'),
    ('a.onnx', b'x', "extension '.onnx', expected .safetensors, .npz, .th"),
    ('weights', b'x', 'no extension'),
    ('a.safetensors', b'hello world', "start with b'hello wo' (11 bytes)"),
    ('a.safetensors', b'PK\3\4' + bytes(60), 'a zip of something else'),
    ('a.safetensors', b'version https://git-lfs.github.com', 'Git LFS'),
  ],
)
def test_not_a_weight_file(tmp_path, name, contents, found):
  path = tmp_path / name
  if contents is not None:
    path.write_bytes(contents)
  assert found in refusal(files.read_tensors, path)


def test_folder_and_empty_safetensors(tmp_path, weights):
  assert 'Is a directory' in refusal(files.read_tensors, tmp_path)
  message = refusal(files.read_tensors, save(weights, {}))
  assert 'no tensors' in message


@pytest.mark.parametrize('keep', [0.02, 0.5, 0.999])
def test_truncated_safetensors(weights, keep):
  save(weights, akamaster())
  whole = weights.read_bytes()
  weights.write_bytes(whole[: int(keep * len(whole))])
  message = refusal(files.read_tensors, weights)
  assert 'truncated or damaged safetensors file' in message


def test_write_is_atomic_and_unflatten_undoes_it(weights, monkeypatch):
  # A transposed view: its buffer lies in another order than its elements.
  tree = {'a': {'b': {'c': np.arange(6.0, dtype=np.float32).reshape(2, 3).T}}}
  files.write_safetensors(weights, tree, {'k': 'v'})
  tensors, metadata = files.read_tensors(weights)
  assert list(tensors) == ['a/b/c']
  assert metadata == {'k': 'v'}
  read = files.unflatten(tensors)
  np.testing.assert_array_equal(read['a']['b']['c'], tree['a']['b']['c'])

  def no_space(*_):
    raise OSError(28, 'No space left on device')

  before = weights.read_bytes()
  monkeypatch.setattr(os, 'fsync', no_space)
  with pytest.raises(InputError, match='cannot be written: No space left'):
    files.write_safetensors(weights, {'other': np.ones(1)}, {})
  assert weights.read_bytes() == before
  assert os.listdir(weights.parent) == [weights.name]


def test_write_refusals(tmp_path):
  path = tmp_path / 'absent' / 'w.safetensors'
  message = refusal(files.write_safetensors, path, {'a': np.ones(1)}, {})
  assert 'No such file or directory' in message
  with pytest.raises(ValueError, match="'a/b'"):
    files.write_safetensors(tmp_path / 'w', {'a/b': np.ones(1)}, {})


@pytest.mark.parametrize('keys', [('a', 'a/b'), ('a/b', 'a')])
def test_unflatten_refuses_a_tensor_that_is_a_group(keys):
  with pytest.raises(InputError, match='a'):
    files.unflatten(dict.fromkeys(keys, np.ones(1)))


# --- npz ---------------------------------------------------------------------


def test_npz_that_would_fill_the_memory(tmp_path):
  path = tmp_path / 'a.npz'
  np.savez_compressed(path, a=np.zeros(2**28 + 1, np.uint8))
  assert 'bytes expand to 268,435,' in refusal(files.read_tensors, path)


def test_unfit_npz(tmp_path):
  path = tmp_path / 'w.npz'
  for contents in (b'hello world', b'PK\3\4' + bytes(60)):
    path.write_bytes(contents)
    message = refusal(files.read_tensors, path)
    assert 'cannot be read as an .npz of arrays' in message
  np.savez(path, a=np.ones(1), text=np.array(['b']))
  message = refusal(files.read_tensors, path)
  assert 'tensor text has type <U1' in message
  target = tmp_path / 'created'
  np.savez(path, a=np.array([Touch(target)], dtype=object))
  message = refusal(files.read_tensors, path)
  assert 'cannot be read as an .npz of arrays' in message
  assert not target.exists()
