"""Small networks of torch: what becomes of each operator, and what is refused.

Each network is exported by torch, imported, and compared with torch.
"""

import collections

import numpy as np
import pytest

from clusterq_jax import importing
from clusterq_jax.errors import InputError

torch = pytest.importorskip('torch')
nn = torch.nn
functional = torch.nn.functional

pytestmark = pytest.mark.torch
_SIDE = 12


class Network(nn.Module):
  """A stem of 8 channels, a function or module, and a classifier."""

  def __init__(self, middle, channels=8, head=None):
    super().__init__()
    self.stem = nn.Conv2d(3, 8, 3, padding=1)
    self.norm = nn.BatchNorm2d(8)
    self.middle = middle
    self.fc = nn.Linear(channels, 5)
    self.head = head or (lambda x: self.fc(x.mean((2, 3))))

  def forward(self, x):
    return self.head(self.middle(self.norm(self.stem(x))))


def _trained(network):
  generator = torch.Generator().manual_seed(0)
  for module in network.modules():
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
      for array, low, high in (
        (module.weight, 0.5, 1.5),
        (module.bias, -0.3, 0.3),
        (module.running_mean, -0.3, 0.3),
        (module.running_var, 0.5, 1.5),
      ):
        array.data.uniform_(low, high, generator=generator)
  return network.eval()


def _import(network, side=_SIDE, batch=2):
  program = torch.export.export(network, (torch.zeros(batch, 3, side, side),))
  return importing.import_program(program)


def _ops(middle, side=_SIDE, **options):
  """Imports a network, compares it with torch, and counts its ops."""
  network = _trained(Network(middle, **options))
  imported = _import(network, side)
  assert importing.parity(network, imported) < 1e-5
  return collections.Counter(
    node.act if node.op == 'act' else node.op for node in imported.graph.nodes
  )


def _refused(network, batch=2):
  with pytest.raises(InputError) as error:
    _import(network, batch=batch)
  assert '\n' not in str(error.value)
  return str(error.value)


_BASE = collections.Counter(['input', 'conv_bn', 'global_avg_pool', 'dense'])
_FIXED = torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1)


class Scaled(nn.Module):
  """Standardises its weights before each use, and scales its result."""

  def __init__(self):
    super().__init__()
    self.conv = nn.Conv2d(8, 8, 3)
    self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 8).view(8, 1, 1))

  def forward(self, x):
    weight = self.conv.weight
    mean = weight.mean((1, 2, 3), keepdim=True)
    weight = (weight - mean) / (
      weight.var((1, 2, 3), keepdim=True) + 1e-3
    ).sqrt()
    return functional.conv2d(x, weight, self.conv.bias) * self.gain


class Residual(nn.Module):
  def __init__(self, inner):
    super().__init__()
    self.inner = inner

  def forward(self, x):
    return self.inner(x) + x


def _twice(x):
  y = x.relu_()
  y.tanh_()
  return x + y


def _squeeze_excite(x):
  return x * x.mean((2, 3), keepdim=True).sigmoid().expand_as(x)


def _shuffle(x):
  n, c, h, w = x.shape
  return x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)


_MIDDLES = {
  'relu6(x + 3) / 6': (lambda x: functional.relu6(x + 3) / 6, 'hard_sigmoid'),
  'x * hard_sigmoid': (lambda x: x * functional.hardsigmoid(x), 'hard_swish'),
  'x * relu6(x + 3) / 6': (
    lambda x: x * functional.hardtanh(x + 3, 0, 6) / 6,
    'hard_swish',
  ),
  'clip': (nn.Hardtanh(-0.5, 1), 'conv'),
  'x / 6 + 0.5, clipped': (lambda x: (x / 6 + 0.5).clamp(0, 1), 'hard_sigmoid'),
  'hardtanh of a default': (nn.Hardtanh(0, 1), 'conv'),
  'clamp': (lambda x: torch.sigmoid(x.clamp(0, 6)), 'sigmoid'),
  'silu': (functional.silu, 'sigmoid mul'),
  'leaky_relu': (lambda x: functional.leaky_relu(x, 0.2), 'leaky_relu'),
  'elu': (lambda x: functional.elu(x, 0.7), 'elu'),
  'gelu': (functional.gelu, 'gelu'),
  'gelu tanh': (lambda x: functional.gelu(x, approximate='tanh'), 'gelu_tanh'),
  'prelu': (nn.PReLU(8), 'prelu'),
  'tanh': (torch.tanh, 'tanh'),
  'in place': (lambda x: x.mul_(2).relu_(), ''),
  'in place after dropout': (
    lambda x: functional.dropout2d(x, training=False).mul_(2) + x,
    'add',
  ),
  'in place, then the operand': (lambda x: x.mul_(2) + x, 'add'),
  'in place, twice': (_twice, 'tanh add'),
  'fixed scale': (lambda x: torch.tanh(x) * _FIXED - 0.5, 'tanh conv'),
  'difference': (lambda x: torch.tanh(x) - x.relu(), 'tanh relu conv add'),
  'weights that are computed': (Scaled(), 'conv'),
  'squeeze-excite': (_squeeze_excite, 'global_avg_pool sigmoid mul'),
  'shuffle': (_shuffle, 'shuffle'),
  'split': (
    lambda x: torch.cat(x.split([2, 6], 1)[::-1], 1),
    'slice slice concat',
  ),
  'select': (
    lambda x: torch.cat([x[:, 2:3], x[:, 1:]], 1),
    'slice slice concat',
  ),
  'ceil_mode': (
    nn.Sequential(
      nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(4, 3, 1, True)
    ),
    'max_pool pad avg_pool',
  ),
  'avg_pool': (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 'avg_pool'),
  'pad': (
    nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(8, 8, (3, 1))),
    'conv',
  ),
  'pad by more than a window': (
    lambda x: functional.avg_pool2d(functional.pad(x, (1, 0, 1, 0)), 1, 2),
    'pad avg_pool',
  ),
  'pad with the lowest number': (
    lambda x: functional.max_pool2d(
      functional.pad(x, (0, 1, 0, 1), value=float('-inf')), 3, 2
    ),
    'max_pool',
  ),
  'pad before max_pool': (
    lambda x: functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, 2),
    'pad max_pool',
  ),
  'adaptive pool': (nn.AdaptiveAvgPool2d((6, 3)), 'REFUSED'),
  'adaptive max pool': (nn.AdaptiveMaxPool2d((4, 4)), 'max_pool'),
  'adaptive repeat': (nn.AdaptiveAvgPool2d(24), 'resize'),
  'upsample': (nn.Upsample(scale_factor=2), 'resize'),
  'upsample to a size': (lambda x: functional.interpolate(x, 24), 'resize'),
  'a stride that does not matter': (nn.AvgPool2d((8, 2), (10, 5)), 'avg_pool'),
  'the type of another': (lambda x: _FIXED.type_as(x) * x.float(), ''),
  'the shape of another': (lambda x: x + _FIXED.expand_as(x), ''),
  'dilated': (nn.Conv2d(8, 8, 3, padding=2, dilation=2), 'conv'),
  'same': (nn.Conv2d(8, 8, 4, padding='same'), 'conv'),
  'BatchNorm beside a reader': (
    Residual(nn.BatchNorm2d(8)),
    'conv_bn add',
  ),
  'crop': (lambda x: torch.tanh(x)[:, :, 1:, :-2], 'tanh conv'),
  'negative pad': (
    lambda x: functional.pad(torch.tanh(x), (0, -1, -2, 0)),
    'tanh conv',
  ),
  'every second pixel': (lambda x: x[:, :, ::2, ::2], 'max_pool'),
}


@pytest.mark.parametrize('name', _MIDDLES)
def test_operators(name):
  middle, more = _MIDDLES[name]
  if more == 'REFUSED':
    with pytest.raises(InputError, match='equal'):
      _ops(middle)
  else:
    assert _ops(middle) == _BASE + collections.Counter(more.split())


def test_the_shortcut_of_option_a():
  def pad(x):
    return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))

  def concat(x):
    x = x[:, :, ::2, ::2]
    zeros = torch.zeros_like(x)
    return torch.cat([x, zeros], 1)

  assert _ops(pad, channels=16)['pad_shortcut'] == 1
  assert _ops(concat, channels=16)['max_pool'] == 1  # and a fixed convolution


def test_heads():
  conv = nn.Conv2d(8, 5, 1)
  pooled = _ops(nn.Identity(), head=lambda x: conv(x).mean((2, 3)))
  assert pooled == _BASE
  pixel = _ops(
    nn.AdaptiveAvgPool2d(1), head=lambda x: conv(x).squeeze(3).squeeze(2)
  )
  assert pixel == _BASE
  after = _ops(nn.Identity(), head=lambda x: conv(x).tanh().mean((2, 3)))
  assert after['dense'] == after['conv'] == 1
  norm = nn.Sequential(nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)).eval()
  normed = _ops(nn.Identity(), head=lambda x: norm(x).mean((2, 3)))
  assert normed['conv_bn'] == 2
  assert normed['dense'] == 1
  two = nn.Linear(8, 3), nn.Linear(8, 4)
  joined = _ops(
    nn.Identity(),
    head=lambda x: torch.cat([f(x.mean((2, 3))) for f in two], 1).clamp(-1, 1),
  )
  assert joined['conv'] == 3  # and the range of clamp
  mean = nn.Linear(8, 5), nn.Linear(8, 5)
  averaged = _ops(
    nn.Identity(), head=lambda x: sum(f(x.mean((2, 3))) for f in mean) / 2
  )
  assert averaged == _BASE + collections.Counter(
    ['add', 'conv', 'conv', 'global_avg_pool']
  )
  pool, fc = nn.AvgPool2d(7, stride=10), nn.Linear(8, 5)
  flat = nn.Linear(8 * 16, 5)
  whole = _ops(nn.AvgPool2d(3), head=lambda x: flat(x.flatten(1)))
  assert whole['dense'] == 1
  assert whole['global_avg_pool'] == 0
  one = _ops(nn.Identity(), head=lambda x: fc(pool(x).flatten(1)))
  assert one['avg_pool'] == 1


def test_files_and_live_programs_are_the_same(tmp_path):
  network = _trained(Network(lambda x: _squeeze_excite(x.to(torch.float32))))
  program = torch.export.export(network, (torch.zeros(2, 3, 8, 8),))
  torch.export.save(program, tmp_path / 'network.pt2')
  live = importing.import_program(program)
  read = importing.import_program(tmp_path / 'network.pt2')
  assert live.graph == read.graph
  for kind, group in live.variables.items():
    for name, leaves in group.items():
      for leaf, array in leaves.items():
        np.testing.assert_array_equal(read.variables[kind][name][leaf], array)


def test_one_image_is_enough_where_nothing_is_ambiguous():
  network = _trained(Network(nn.ReLU()))
  imported = _import(network, batch=1)
  assert importing.parity(network, imported) < 1e-5


def test_names_do_not_clash_with_attributes_of_modules():
  class Names(nn.Module):
    def __init__(self):
      super().__init__()
      self.name = nn.Conv2d(3, 4, 3)
      self.init = nn.BatchNorm2d(4)
      self.layers = nn.Linear(4, 5)

    def forward(self, x):
      return self.layers(self.init(self.name(x)).mean((2, 3)))

  network = _trained(Names())
  imported = _import(network)
  assert imported.graph.nodes[1].name == 'name_'
  assert imported.graph.nodes[-1].name == 'layers_'
  assert importing.parity(network, imported) < 1e-5


@pytest.mark.parametrize(
  ('middle', 'words'),
  [
    (nn.LayerNorm((8, 12, 12)), ('layer_norm', 'in middle (LayerNorm)')),
    (nn.GroupNorm(2, 8), ('group_norm', 'BatchNorm')),
    (lambda x: x.softmax(1), ('softmax', "the network's own forward")),
    (nn.Upsample(scale_factor=2, mode='bilinear'), ('bilinear', 'nearest')),
    (nn.ReflectionPad2d(1), ('pad', 'only zeros')),
    (lambda x: x * x.mean(1, keepdim=True), ('mean', 'height and width')),
    (nn.Conv2d(8, 8, 3, stride=(1, 2)), ('stride differs', 'equal')),
    (lambda x: x.clamp(max=3), ('clips', 'two numbers')),
    (
      lambda x: functional.pixel_shuffle(x, 2).repeat(1, 4, 1, 1),
      ('pixel_shuffle', 'no layer computes it'),
    ),
    (lambda x: x[:, :, 1::2, :], ('slice', 'every n-th row')),
    (nn.Upsample(scale_factor=2.05), ('factor is 2.05', 'whole factors')),
    (lambda x: x.to(torch.int32).float(), ('casts to torch.int32',)),
    (nn.AvgPool2d((10, 2), (2, 3)), ('stride differs', 'equal')),
    (lambda x: x * x.mean(), ('only over height',)),
  ],
)
def test_operators_that_are_refused(middle, words):
  network = _trained(Network(middle))
  message = _refused(network)
  for word in words:
    assert word in message


def test_a_result_that_was_overwritten_is_refused():
  def middle(x):
    y = x.view(2, 8, 144)
    x.relu_()
    return (y * 2).view(2, 8, 12, 12)

  assert 'inplace=False' in _refused(_trained(Network(middle)))


class Two(nn.Module):
  def __init__(self, network):
    super().__init__()
    self.network = network

  def forward(self, x):
    y = self.network(x)
    return y, y.relu()


class NoNorm(nn.Module):
  def __init__(self):
    super().__init__()
    self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

  def forward(self, x):
    return self.fc(self.conv(x).mean((2, 3)))


def test_networks_that_are_refused():
  network = _trained(Network(nn.ReLU()))
  assert 'returns 2 tensors' in _refused(Two(network))
  assert 'no BatchNorm' in _refused(NoNorm().eval())
  features = _trained(Network(nn.ReLU(), head=lambda x: x))
  assert 'only classifiers' in _refused(features)
  for body in (nn.ReLU(), lambda x: functional.silu(x), Residual(nn.ReLU())):
    pooled = _trained(Network(body, head=lambda x: x.mean((2, 3))))
    assert 'features, not logits' in _refused(pooled)
  squeezed = _trained(Network(nn.ReLU(), head=lambda x: x.mean((2, 3))))
  squeezed.head = lambda x: squeezed.fc(x.mean((2, 3), keepdim=True).squeeze())
  assert 'torch.zeros(2, 3, 12, 12)' in _refused(squeezed, batch=1)
  turned = _trained(Network(nn.ReLU()))
  turned.head = lambda x: turned.fc(
    x.mean((2, 3)).transpose(0, 1).reshape(2, 8)
  )
  assert 'reorders the axes' in _refused(turned)
  network.train()
  assert 'network.eval()' in _refused(network)
  network = _trained(Network(nn.Dropout(0.5)))
  network.middle.train()
  assert 'network.eval()' in _refused(network)


def test_decomposed_programs_are_refused():
  network = _trained(Network(nn.ReLU()))
  program = torch.export.export(network, (torch.zeros(2, 3, 8, 8),))
  with pytest.raises(InputError, match=r'without run_decompositions\(\)'):
    importing.import_program(program.run_decompositions())


def test_dynamic_sizes_are_refused():
  network = _trained(Network(nn.ReLU()))
  program = torch.export.export(
    network,
    (torch.zeros(2, 3, 8, 8),),
    dynamic_shapes=({0: torch.export.Dim('batch', min=2)},),
  )
  with pytest.raises(InputError, match='without dynamic_shapes'):
    importing.import_program(program)
