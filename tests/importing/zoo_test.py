"""Networks by name, and networks in the user's own process."""

import sys
import types

import pytest

from clusterq_jax import convert, from_torch
from clusterq_jax.errors import InputError
from clusterq_jax.importing import zoo
from clusterq_jax.weights import teacher

torch = pytest.importorskip('torch')
import safetensors.torch  # noqa: E402

nn = torch.nn
pytestmark = pytest.mark.torch


class Network(nn.Module):
  """As timm makes them."""

  pretrained_cfg = {
    'input_size': (3, 12, 16),
    'mean': (0.5, 0.4, 0.3),
    'std': (0.2, 0.2, 0.2),
    'crop_pct': 0.9,
  }

  def __init__(self, num_classes=4, channels=3):
    super().__init__()
    self.conv = nn.Conv2d(channels, 8, 3, 2, 1)
    self.norm = nn.BatchNorm2d(8)
    self.fc = nn.Linear(8, num_classes)

  def forward(self, x):
    return {'logits': self.fc(self.norm(self.conv(x)).mean((2, 3)))}


def _trained(**options):
  network = Network(**options)
  network.norm.running_mean.uniform_(-0.5, 0.5)
  network.norm.running_var.uniform_(0.5, 1.5)
  return network.eval()


@pytest.fixture
def timm(monkeypatch):
  """A module that makes networks as timm does."""

  def create_model(name, pretrained, num_classes=1000):
    assert not pretrained
    if name != 'small':
      raise RuntimeError(f'Unknown model ({name})')
    return Network(num_classes)

  module = types.ModuleType('timm')
  module.create_model = create_model
  monkeypatch.setitem(sys.modules, 'timm', module)


@pytest.mark.usefixtures('timm')
def test_a_network_by_name(tmp_path):
  source, output = tmp_path / 'a.pth', tmp_path / 'b.safetensors'
  state = {f'module.{k}': v for k, v in _trained().state_dict().items()}
  torch.save({'state_dict': state, 'epoch': 3}, source)
  report = convert.import_network(str(source), str(output), 'timm:small')
  assert 'parity with torch on 4 random images' in report
  assert 'WARNING' not in report
  loaded = teacher.load('', str(output))
  assert loaded.preprocessing.image_size == (12, 16)
  assert loaded.preprocessing.mean == (0.5, 0.4, 0.3)
  assert loaded.crop == 0.9
  # What the user says goes before what timm says.
  other = tmp_path / 'c.safetensors'
  convert.import_network(
    str(source), str(other), 'timm:small', image_size=(8, 8), mean=(0.1,) * 3
  )
  preprocessing = teacher.load('', str(other)).preprocessing
  assert preprocessing.image_size == (8, 8)
  assert preprocessing.mean == (0.1, 0.1, 0.1)


@pytest.mark.usefixtures('timm')
def test_the_classifier_is_not_the_last_key_of_safetensors(tmp_path):
  path = tmp_path / 'a.safetensors'
  safetensors.torch.save_file(_trained().state_dict(), path)
  assert zoo.build('timm:small', path).fc.out_features == 4


@pytest.mark.usefixtures('timm')
@pytest.mark.parametrize(
  ('name', 'entry', 'message'),
  [
    ('timm:', '', 'expected one of'),
    ('timm:large', '', r'timm refuses it: Unknown model \(large\)'),
    ('timm:small', 'ema', "--entry=ema: .* has the entries ''"),
    ('torchvision:resnet18', '', 'needs torchvision, which cannot be imported'),
  ],
)
def test_names_that_are_refused(tmp_path, monkeypatch, name, entry, message):
  monkeypatch.setitem(sys.modules, 'torchvision', None)
  path = tmp_path / 'a.pth'
  torch.save(_trained().state_dict(), path)
  with pytest.raises(InputError, match=message):
    zoo.build(name, path, entry)


@pytest.mark.usefixtures('timm')
def test_weights_of_another_network_are_refused(tmp_path):
  path = tmp_path / 'a.pth'
  torch.save(nn.Linear(3, 4).state_dict(), path)
  with pytest.raises(
    InputError, match='does not fit timm:small: .*conv.weight'
  ):
    zoo.build('timm:small', path)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_a_live_network(tmp_path, capsys, channels):
  output = tmp_path / 'a.safetensors'
  network = _trained(channels=channels)
  difference = from_torch(
    network, (8, 10), (0.5,) * channels, (0.25,) * channels, output
  )
  assert difference < 1e-5
  assert f'for images of 8x10x{channels}, 4 classes' in capsys.readouterr().out
  assert teacher.load('', str(output)).graph.image_shape == (8, 10, channels)


def test_live_networks_that_are_refused(tmp_path):
  output = tmp_path / 'a.safetensors'

  def refused(network, size=(8, 8)):
    with pytest.raises(InputError) as error:
      from_torch(network, size, (0.5,) * 3, (1.0,) * 3, output)
    return str(error.value)

  class Normalized(Network):
    def forward(self, x):
      return super().forward(x * 2 - 3)

  class Branches(Network):
    def forward(self, x):
      return super().forward(x if x.sum() > 0 else -x)

  assert 'call network.eval() first' in refused(Network())
  assert 'expected height and width' in refused(_trained(), 8)
  assert 'torch.export.export fails' in refused(Branches().eval())
  message = refused(Normalized().eval())
  assert 'after the normalisation that the network begins with' in message
  assert not output.exists()
