"""Files of torch.export.save: what is read, and what is refused."""

import io
import json
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from clusterq_jax.errors import InputError
from clusterq_jax.importing import pt2_files, tensors

_FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'programs'
_FILE = _FOLDER / 'release_2.13.pt2'
_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def _changed(tmp_path, member, change, source=_FILE):
  """A copy in which one JSON member is changed, or left out if None."""
  path = tmp_path / 'changed.pt2'
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, 'w') as new:
    for name in old.namelist():
      contents = old.read(name)
      if name.endswith(member):
        if change is None:
          continue
        whole = json.loads(contents)
        change(whole)
        contents = json.dumps(whole).encode()
      new.writestr(name, contents)
  return path


def test_a_program_is_plain_data():
  program = pt2_files.read(_FILE)
  (image,) = program.inputs
  assert program.shapes[image] == (2, 3, 32, 32)
  assert program.tensors['conv1.weight'].shape == (8, 3, 3, 3)
  assert program.tensors['gain'].shape == (1, 3, 1, 1)
  conv = next(call for call in program.calls if call.op == 'conv2d')
  assert conv.operands['padding'] == [1, 1]
  assert conv.where == 'aten.conv2d.default in conv1 (Conv2d)'
  assert program.outputs == program.calls[-1].outputs


@pytest.mark.parametrize('release', ['2.7', '2.8', '2.9'])
def test_older_releases_hold_the_same_tensors(release):
  program = pt2_files.read(_FILE)
  older = pt2_files.read(_FOLDER / f'release_{release}.pt2')
  assert [c.target for c in older.calls] == [c.target for c in program.calls]
  common = older.tensors.keys() & program.tensors.keys()
  assert len(common) > 10
  for key in common:
    np.testing.assert_array_equal(older.tensors[key], program.tensors[key])


def test_torch_is_not_needed(tmp_path):
  """Neither torch nor any package of a zoo can be imported."""
  output = tmp_path / 'network.safetensors'
  code = f"""
import sys
class Blocker:
  def find_spec(self, name, *_):
    if name.partition('.')[0] in ('torch', 'torchvision', 'timm', 'pytorchcv'):
      raise ImportError(name)
sys.meta_path.insert(0, Blocker())
from clusterq_jax import convert
sys.exit(convert.main(['convert', '--input={_FILE}', '--output={output}',
  '--mean=0.5,0.5,0.5', '--std=1,1,1']))
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=_REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert output.exists()


def _set_schema(model):
  model['schema_version']['major'] = 9


def _set_dynamic(model):
  values = model['graph_module']['graph']['tensor_values']
  next(iter(values.values()))['sizes'][0] = {'as_expr': {'expr_str': 's0'}}


def _set_offset(config):
  config['config']['fc.weight']['tensor_meta']['storage_offset'] = {'as_int': 1}


def _set_repeated(config):
  meta = config['config']['fc.weight']['tensor_meta']
  meta['sizes'] = [{'as_int': 2**20}, {'as_int': 2**19}]
  meta['strides'] = [{'as_int': 0}, {'as_int': 0}]


def _set_path(config):
  config['config']['fc.weight']['path_name'] = '../../../etc/passwd'


@pytest.mark.parametrize(
  ('member', 'change', 'message'),
  [
    ('models/model.json', None, 'no program'),
    ('models/model.json', _set_schema, 'schema 9'),
    ('models/model.json', _set_dynamic, 'dynamic size'),
    ('model_weights_config.json', _set_offset, 'beyond its storage'),
    ('model_weights_config.json', _set_repeated, 'beyond its storage'),
    ('model_weights_config.json', _set_path, 'damaged program'),
    ('model_constants_config.json', None, 'damaged program'),
    ('weights/weight_0', None, 'damaged program'),
  ],
)
def test_files_that_are_refused(tmp_path, member, change, message):
  path = _changed(tmp_path, member, change)
  with pytest.raises(InputError, match=message) as error:
    pt2_files.read(path)
  assert str(error.value).startswith(f'{path}: ')
  assert '\n' not in str(error.value)


def test_other_files_are_refused(tmp_path):
  with pytest.raises(InputError, match='no such file'):
    pt2_files.read(tmp_path / 'none.pt2')
  path = tmp_path / 'a.pt2'
  path.write_bytes(_FILE.read_bytes()[:-100])
  with pytest.raises(InputError, match='not a complete .pt2 file'):
    pt2_files.read(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/data.pkl', b'')
  with pytest.raises(InputError, match='a torch checkpoint'):
    pt2_files.read(path)


def test_deep_json_is_refused(tmp_path):
  path = tmp_path / 'a.pt2'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/models/model.json', '[' * 200_000)
  with pytest.raises(InputError, match='damaged program'):
    pt2_files.read(path)


def test_views_of_one_storage():
  raw = np.arange(12, dtype=np.float32).tobytes()
  float32 = np.dtype(np.float32)
  transposed = tensors.strided('a', raw, float32, (4, 3), (1, 4), 0)
  expected = np.arange(12, dtype=np.float32).reshape(3, 4).T
  np.testing.assert_array_equal(transposed, expected)
  part = tensors.strided('a', raw, float32, (2, 2), (4, 1), 5)
  np.testing.assert_array_equal(part, [[5, 6], [9, 10]])
  assert tensors.strided('a', b'', float32, (0, 3), (3, 1), 0).shape == (0, 3)
  assert tensors.strided('a', raw, float32, (), (), 3) == 3
  with pytest.raises(ValueError, match='beyond'):
    tensors.strided('a', raw, float32, (2, 2), (8, 1), 5)


def _pickle(instructions):
  raw = io.BytesIO()
  with zipfile.ZipFile(raw, 'w') as archive:
    archive.writestr('archive/data.pkl', instructions)
  return raw.getvalue()


@pytest.mark.parametrize(
  ('instructions', 'message'),
  [
    (b'cos\nsystem\n(S"touch escaped"\ntR.', 'STRING'),
    (b'\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.', 'os.system'),
    (b'\x80\x02ctorch\nload\n(tR.', 'torch.load'),
    (b'\x80\x02K\x01r\xff\xff\xff\x7f.', 'LONG_BINPUT'),
    (b'\x80\x02K\x01.', 'something else'),
  ],
)
def test_pickles_of_anything_else_are_refused(instructions, message):
  with pytest.raises(Exception, match=message):
    tensors.read_pickled(_pickle(instructions))
