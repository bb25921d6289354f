"""The conversion of weights: what is written, said and refused."""

import pathlib

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver

from clusterq_jax import convert, weights
from clusterq_jax.errors import InputError
from clusterq_jax.models import registry
from clusterq_jax.weights import layouts, matching, teacher


@pytest.fixture
def run(capsys):
  """Calls the command line; returns (code, stdout, stderr)."""

  def call(**values):
    argv = ['convert', *(f'--{name}={value}' for name, value in values.items())]
    capsys.readouterr()
    with flagsaver.as_parsed():
      flags.FLAGS.unparse_flags()
      code = convert.main(argv)
    return code, *capsys.readouterr()

  return call


def _state(arch, layout, classes=5, **options):
  """Random tensors under the names that a layout gives them."""
  architecture = registry.architecture(arch)
  layers = matching.layers_of(architecture, 3, num_classes=classes, **options)
  (layout,) = (
    found
    for found in layouts.LAYOUTS[architecture.family]
    if found.name == layout
  )
  random = np.random.RandomState(0)
  return {
    layout.key(layer, leaf): random.rand(*layout.to_source(shape)).astype(
      np.float32
    )
    for layer in layers
    for leaf, shape in layer.shapes.items()
  }


@pytest.fixture
def source(tmp_path):
  path = tmp_path / 'resnet50.safetensors'
  state = _state('resnet50', 'pytorchcv', stride_first=True)
  safetensors.numpy.save_file(state, path)
  return path


def test_the_converted_file_is_the_same_teacher(run, source, tmp_path):
  output = tmp_path / 'deep' / 'converted.safetensors'
  names = tmp_path / 'names.txt'
  names.write_text('ant\nbee\ncat\ndog\nelk\n')
  code, out, err = run(
    arch='resnet50',
    input=source,
    output=output,
    class_names=names,
    mean='0.1,0.2,0.3',
  )
  assert code == 0, err
  assert 'resnet50 in the pytorchcv layout' in out
  assert 'Nothing is missing' in out
  # Where the strides are shows in no tensor: the file must say it.
  converted = teacher.load('resnet50', str(output))
  original = weights.load(source, 'resnet50')
  assert converted.graph == original.graph
  assert converted.graph.node('stage2_block1_conv1').strides == 2
  for collection, layers in original.variables.items():
    for name, leaves in layers.items():
      for leaf, value in leaves.items():
        np.testing.assert_array_equal(
          converted.variables[collection][name][leaf], value
        )
  assert converted.class_names == ('ant', 'bee', 'cat', 'dog', 'elk')
  # Given, and usual for the architecture: the second is said.
  assert converted.preprocessing.mean == (0.1, 0.2, 0.3)
  assert converted.preprocessing.std == (0.229, 0.224, 0.225)
  assert 'WARNING' in out
  assert 'std (0.229' in out
  assert 'mean (' not in out


def test_nothing_says_what_is_expected(run, tmp_path):
  source, output = tmp_path / 'a.safetensors', tmp_path / 'b.safetensors'
  safetensors.numpy.save_file(
    _state('resnet8', 'akamaster', shortcut='pad'), source
  )
  code, out, _ = run(arch='resnet8', input=source, output=output)
  assert code == 0
  assert 'WARNING: the input that these weights expect is unknown' in out
  assert 'give --image_size, --mean, --std, or config.teacher.image_size' in out
  with safetensors.safe_open(output, 'np') as file:
    assert not {'mean', 'std'} & file.metadata().keys()


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'input': 'nowhere.pth'}, 'nowhere.pth: cannot be read: No such file'),
    ({'arch': 'resnet18'}, 'does not fit resnet18'),
    ({'arch': 'resnet51'}, 'resnet50b'),
    ({'mean': '0.5,x'}, '--mean=0.5,x: expected a few numbers'),
    ({'image_size': '224'}, '--image_size=224: expected 2 numbers'),
    ({'output': 'a.npz'}, 'expected a name in .safetensors'),
    ({'output': ''}, '--output is missing'),
    ({'class_names': 'names.txt'}, '2 names'),
    ({'class_names': 'none.txt'}, 'none.txt: No such file'),
  ],
)
def test_refusals(run, source, tmp_path, monkeypatch, changes, expected):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'names.txt').write_text('ant\nbee\n')
  arguments = {
    'arch': 'resnet50',
    'input': source,
    'output': 'new.safetensors',
    **changes,
  }
  before = sorted(tmp_path.iterdir())
  code, _, err = run(**arguments)
  assert code == 2
  assert expected in err
  assert len(err.strip().splitlines()) == 1
  assert sorted(tmp_path.iterdir()) == before


def test_class_names_with_a_byte_order_mark(run, source, tmp_path):
  names, output = tmp_path / 'names.txt', tmp_path / 'new.safetensors'
  names.write_bytes('\ufeffant\r\nbee\r\ncat\r\ndog\r\nélan\r\n\r\n'.encode())
  code, _, err = run(
    arch='resnet50', input=source, output=output, class_names=names
  )
  assert code == 0, err
  loaded = teacher.load('resnet50', str(output))
  assert loaded.class_names == ('ant', 'bee', 'cat', 'dog', 'élan')


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'mean': '0.5'}, '--mean=(0.5,): expected 3 number(s)'),
    ({'std': '0.2,0,0.2'}, '--std=(0.2, 0.0, 0.2): expected positive'),
    ({'mean': '123.675,116.28,103.53'}, 'expected numbers from 0 to 1, which'),
    ({'image_size': '0,224'}, '--image_size=(0, 224): expected height'),
    ({'class_names': 'latin.txt'}, 'latin.txt: byte 0 is 0xe9: expected'),
  ],
)
def test_what_cannot_be_meant(
  run, source, tmp_path, monkeypatch, changes, expected
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'latin.txt').write_bytes('élan\n'.encode('latin-1'))
  output = tmp_path / 'new.safetensors'
  code, _, err = run(
    **{'arch': 'resnet50', 'input': source, 'output': output, **changes}
  )
  assert code == 2
  assert expected in err
  assert len(err.strip().splitlines()) == 1
  assert not output.exists()


def test_metadata_errors_name_file_and_key(tmp_path):
  state = _state('resnet8', 'akamaster', shortcut='pad')
  path = tmp_path / 'a.safetensors'
  safetensors.numpy.save_file(state, path, {'mean': '[0.5,'})
  with pytest.raises(
    InputError, match=r"a\.safetensors: metadata mean is '\[0"
  ):
    teacher.load('resnet8', str(path))


def test_help(capsys):
  assert convert.main(['convert', '--help']) == 0
  assert '--class_names' in capsys.readouterr().out


def test_nothing_is_overwritten(run, source):
  before = source.read_bytes()
  code, _, err = run(arch='resnet50', input=source, output=source)
  assert code == 2
  assert 'exists' in err
  assert source.read_bytes() == before


_PROGRAM = (
  pathlib.Path(__file__).parent / 'golden' / 'programs' / 'inception.pt2'
)


def test_a_program_becomes_a_teacher(run, tmp_path):
  names, output = tmp_path / 'names.txt', tmp_path / 'new.safetensors'
  names.write_text('\n'.join('abcdefghij'))
  code, out, err = run(
    input=_PROGRAM,
    output=output,
    mean='0.485,0.456,0.406',
    std='0.229,0.224,0.225',
    image_size='48,48',
    class_names=names,
  )
  assert code == 0, err
  assert 'for images of 48x48x3, 10 classes' in out
  loaded = teacher.load('', str(output))
  assert loaded.graph.image_shape == (48, 48, 3)
  assert loaded.class_names == tuple('abcdefghij')
  # The network itself begins with another normalisation.
  np.testing.assert_allclose(loaded.preprocessing.mean, 0.5, rtol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'mean': None}, '--mean is missing'),
    ({'std': '1,1'}, '--std=(1.0, 1.0): expected 3 number(s)'),
    ({'arch': 'resnet18'}, '--arch=resnet18: '),
    ({'image_size': '32,32'}, 'was exported for images of 48x48'),
    ({'output': 'a.npz'}, '--output=a.npz: expected a name in .safetensors'),
    ({'class_names': 'names.txt'}, '--class_names: 2 names; the network has'),
    ({'input': 'none.pt2'}, 'none.pt2: no such file'),
    ({'input': 'none.pth'}, '--arch is missing'),
    ({'input': 'none.pth', 'arch': 'keras:a'}, 'expected one of torchvision:'),
  ],
)
def test_programs_that_are_refused(
  run, tmp_path, monkeypatch, changes, expected
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'names.txt').write_text('ant\nbee\n')
  arguments = {
    'input': _PROGRAM,
    'output': 'new.safetensors',
    'mean': '0.5,0.5,0.5',
    'std': '1,1,1',
    **changes,
  }
  code, _, err = run(**{k: v for k, v in arguments.items() if v is not None})
  assert code == 2
  assert expected in err
  assert len(err.strip().splitlines()) == 1
  assert not (tmp_path / 'new.safetensors').exists()
