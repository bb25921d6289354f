"""Writes the golden programs of torch.export, and what torch makes of images.

    pip install torch==2.13.0 torchvision==0.28.0 timm==1.0.31 pytorchcv==0.0.74
    python tests/golden/make_programs.py

With another release of torch, and no other package, `make_programs.py release`
writes `release_2.9.pt2` or the like: one small network as that release saves
it. Files are compressed, example inputs are left out, and weights are rounded
so that they compress well.
"""

import io
import json
import pathlib
import sys
import zipfile

import numpy as np
import torch
from torch import nn

FOLDER = pathlib.Path(__file__).resolve().parent / 'programs'
LOGITS = FOLDER / 'logits.json'
IMAGES, CLASSES = 2, 10


def images(shape: tuple[int, int, int]) -> np.ndarray:
  """Network input, float32 [IMAGES, H, W, C], for a shape [H, W, C]."""
  return np.random.RandomState(0).randn(IMAGES, *shape).astype(np.float32)


class Small(nn.Module):
  """A bit of everything that files hold: constants, buffers, shared weights."""

  def __init__(self):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    self.bn1 = nn.BatchNorm2d(8)
    self.relu = nn.ReLU(inplace=True)
    self.block = nn.Sequential(
      nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish()
    )
    self.pool = nn.AdaptiveAvgPool2d(1)
    self.drop = nn.Dropout(0.2)
    self.fc = nn.Linear(8, CLASSES)
    self.register_buffer('gain', torch.tensor([1.0, 0.5, 2.0]).view(1, 3, 1, 1))

  def forward(self, x):
    x = x * self.gain + torch.tensor([0.0, 0.25, 0.5]).view(1, 3, 1, 1)
    x = self.relu(self.bn1(self.conv1(x)))
    x = x + self.relu(x)
    x = self.block(x)
    low, high = x.chunk(2, 1)
    x = torch.cat([high, low], 1)
    return self.fc(self.drop(self.pool(x).flatten(1)))


class Unit(nn.Sequential):
  """Convolution, BatchNorm, ReLU."""

  def __init__(self, inputs, outputs, kernel, stride=1, padding=0):
    super().__init__(
      nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
      nn.BatchNorm2d(outputs, 1e-3),
      nn.ReLU(),
    )


class Inception(nn.Module):
  """Ceiling pools, padded average pools, 1x7 kernels, transform_input."""

  def __init__(self):
    super().__init__()
    self.stem = Unit(3, 12, 3, 2)
    self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
    self.branch1 = Unit(12, 8, 1)
    self.branch2 = nn.Sequential(
      Unit(12, 8, 1),
      Unit(8, 8, (1, 7), 1, (0, 3)),
      Unit(8, 8, (7, 1), 1, (3, 0)),
    )
    self.branch3 = Unit(12, 8, 1)
    self.pool2 = nn.AvgPool2d(3, 2, 1, ceil_mode=True)
    self.reduce = Unit(24, 16, 3, 2)
    self.fc = nn.Linear(16, CLASSES)

  def forward(self, x):
    # As torchvision's GoogLeNet and Inception do.
    parts = [
      torch.unsqueeze(x[:, i], 1) * (std / 0.5) + (mean - 0.5) / 0.5
      for i, (mean, std) in enumerate(
        [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]
      )
    ]
    x = self.pool1(self.stem(torch.cat(parts, 1)))
    pooled = nn.functional.avg_pool2d(x, 3, 1, 1)
    x = torch.cat([self.branch1(x), self.branch2(x), self.branch3(pooled)], 1)
    x = self.reduce(self.pool2(x))
    return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class VggBN(nn.Module):
  """Convolutions with bias, hidden dense layers with and without BatchNorm."""

  def __init__(self):
    super().__init__()
    self.features = nn.Sequential(
      nn.Conv2d(1, 8, 3, padding=1),
      nn.BatchNorm2d(8),
      nn.ReLU(True),
      nn.MaxPool2d(2, 2),
      nn.Conv2d(8, 16, 3, padding=2, dilation=2),
      nn.BatchNorm2d(16),
      nn.ReLU(True),
      nn.MaxPool2d(2, 2),
    )
    self.avgpool = nn.AdaptiveAvgPool2d((3, 4))
    self.classifier = nn.Sequential(
      nn.Linear(16 * 12, 32),
      nn.ReLU(True),
      nn.Dropout(),
      nn.Linear(32, 24),
      nn.BatchNorm1d(24),
      nn.ReLU(True),
      nn.Linear(24, CLASSES),
    )

  def forward(self, x):
    x = self.avgpool(self.features(x))
    return self.classifier(x.view(x.size(0), -1))


def regnety():
  from timm.models import regnet

  config = regnet.RegNetCfg(
    w0=8, wa=8, wm=1.5, depth=6, group_size=8, se_ratio=0.25
  )
  return regnet.RegNet(config, num_classes=CLASSES)


def densenet():
  from torchvision.models import DenseNet

  return DenseNet(6, (2, 2), 12, bn_size=2, num_classes=CLASSES)


def mobilenet_v3():
  from torchvision.models import mobilenetv3 as m

  settings, last = m._mobilenet_v3_conf('mobilenet_v3_small', width_mult=0.25)
  return m.MobileNetV3(settings[:6], 64, num_classes=CLASSES)


def shufflenet_v2():
  from torchvision.models import ShuffleNetV2

  return ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 48], num_classes=CLASSES)


def efficientnet():
  """TensorFlow's padding, silu, squeeze-excite."""
  from timm.models import efficientnet as m

  return m._gen_efficientnet(
    'tf_efficientnet_b0',
    channel_multiplier=0.1,
    depth_multiplier=0.3,
    pad_type='same',
    bn_eps=1e-3,
    num_classes=CLASSES,
  )


def preresnet():
  """BatchNorm before convolutions."""
  from pytorchcv.models.preresnet import PreResNet

  return PreResNet(
    channels=[[8, 8], [16], [24]],
    init_block_channels=8,
    bottleneck=False,
    conv1_stride=True,
    in_size=(112, 112),
    num_classes=CLASSES,
  )


# Name of a file: (how to make the network, [H, W, C] of its images).
CASES = {
  'regnety': (regnety, (64, 64, 3)),
  'densenet': (densenet, (64, 48, 3)),
  'mobilenet_v3': (mobilenet_v3, (64, 64, 3)),
  'shufflenet_v2': (shufflenet_v2, (64, 64, 3)),
  'inception': (Inception, (48, 48, 3)),
  'efficientnet': (efficientnet, (63, 50, 4)),
  'vgg_bn': (VggBN, (48, 64, 1)),
  'preresnet': (preresnet, (112, 112, 3)),
}


def train(network: nn.Module, shape: tuple[int, int, int]) -> None:
  """Gives weights and statistics as if trained, on a coarse grid."""
  random = np.random.RandomState(1)
  with torch.no_grad():
    for module in network.modules():
      if isinstance(module, nn.modules.batchnorm._BatchNorm):
        size = len(module.weight)
        module.weight.copy_(torch.from_numpy(random.uniform(0.5, 1.5, size)))
        module.bias.copy_(torch.from_numpy(0.2 * random.randn(size)))
        module.momentum = None
      elif isinstance(module, (nn.Conv2d, nn.Linear)):
        weight = module.weight
        values = random.randn(*weight.shape) / np.sqrt(weight[0].numel() / 2)
        weight.copy_(torch.from_numpy(values))
    h, w, c = shape
    network.train()
    network(torch.from_numpy(random.randn(8, c, h, w).astype(np.float32)))
    for value in [*network.parameters(), *network.buffers()]:
      if value.is_floating_point():
        value.copy_((value * 64).round() / 64 + 2**-10 * (value > 0))
  network.eval()


def save(network: nn.Module, shape: tuple[int, int, int], name: str) -> None:
  """Writes the program, compressed, and says how large it is."""
  h, w, c = shape
  program = torch.export.export(network, (torch.zeros(2, c, h, w),))
  raw = io.BytesIO()
  torch.export.save(program, raw)
  path = FOLDER / f'{name}.pt2'
  with (
    zipfile.ZipFile(raw) as old,
    zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as new,
  ):
    for info in old.infolist():
      if 'sample_inputs' not in info.filename and (
        'example_inputs' not in info.filename
      ):
        # A fixed date, so that the same weights give the same file.
        copy = zipfile.ZipInfo(info.filename)
        copy.compress_type = zipfile.ZIP_DEFLATED
        new.writestr(copy, old.read(info))
  x = torch.from_numpy(images(shape).transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    logits = network.double()(x.double()).numpy()
  known = json.loads(LOGITS.read_text()) if LOGITS.exists() else {}
  known[name] = {'shape': shape, 'logits': logits.round(8).tolist()}
  LOGITS.write_text(json.dumps(known, indent=1, sort_keys=True) + '\n')
  print(name, path.stat().st_size, 'bytes')


def _define_detection() -> torch.library.Library:
  """Lets a torchvision whose compiled part does not fit be imported."""
  library = torch.library.Library('torchvision', 'DEF')
  library.define('nms(Tensor dets, Tensor scores, float threshold) -> Tensor')
  library.define('qnms(Tensor dets, Tensor scores, float threshold) -> Tensor')
  return library  # it goes when its Python object does


def main():
  FOLDER.mkdir(exist_ok=True)
  version = '.'.join(torch.__version__.split('.')[:2])
  cases = {f'release_{version}': (Small, (32, 32, 3))}
  if sys.argv[1:] != ['release']:
    cases |= CASES
    detection = _define_detection()  # noqa: F841
  for name, (make, shape) in cases.items():
    torch.manual_seed(0)
    network = make()
    if shape[2] == 4:
      stem = network.conv_stem
      stem.weight = nn.Parameter(torch.zeros(len(stem.weight), 4, 3, 3))
    train(network, shape)
    save(network, shape, name)


if __name__ == '__main__':
  main()
