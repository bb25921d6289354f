"""Trains a small network with squeeze-excite and hard_swish, in plain torch.

    python -m benchmarks.train_se_network \\
        --data=/usr/share/datasets/fashion-mnist \\
        --output=tests/assets/se_network.pt2

The network has the blocks of MobileNetV3. It stands for a user's own class, so
that tests of these layers have real statistics and a real accuracy. It trains
on 55,000 of Fashion-MNIST's 60,000 training images; the last 5,000 are the dev
split, as in `clusterq_jax.pretrain`. The script writes what torch.export makes
of the network. The same seed and number of threads give the same weights.
"""

import argparse
import pathlib
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from clusterq_jax import data

DEV_IMAGES = 5_000
# Of the pixels of the training images, from 0 to 1.
MEAN, STD = 0.2861, 0.353
_BATCH = 128
# Epochs, and highest learning rate, of each cycle.
_CYCLES = ((10, 6e-3), (4, 2e-3))


class SqueezeExcite(nn.Module):
  """Scales each channel by a gate that depends on all channels' means."""

  def __init__(self, channels: int, squeezed: int):
    super().__init__()
    self.reduce = nn.Conv2d(channels, squeezed, 1)
    self.expand = nn.Conv2d(squeezed, channels, 1)

  def forward(self, x):
    s = functional.adaptive_avg_pool2d(x, 1)
    s = functional.relu(self.reduce(s))
    return x * functional.hardsigmoid(self.expand(s))


def _conv_bn(inputs, outputs, kernel=1, stride=1, groups=1, act=None):
  conv = nn.Conv2d(
    inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
  )
  return nn.Sequential(
    conv, nn.BatchNorm2d(outputs), *([] if act is None else [act()])
  )


class Block(nn.Module):
  """Expands, convolves each channel, gates, and projects."""

  def __init__(self, inputs, outputs, wide, kernel, stride, squeezed, act):
    super().__init__()
    self.expand = _conv_bn(inputs, wide, act=act)
    self.depthwise = _conv_bn(wide, wide, kernel, stride, wide, act)
    self.gate = SqueezeExcite(wide, squeezed) if squeezed else nn.Identity()
    self.project = _conv_bn(wide, outputs)
    self.residual = stride == 1 and inputs == outputs

  def forward(self, x):
    y = self.project(self.gate(self.depthwise(self.expand(x))))
    return x + y if self.residual else y


class SENetwork(nn.Module):
  """Classifies normalised images, [B, 1, 28, 28]; returns logits, [B, 10]."""

  def __init__(self):
    super().__init__()
    self.stem = _conv_bn(1, 16, 3, 2, act=nn.Hardswish)
    self.blocks = nn.Sequential(
      Block(16, 24, 48, 3, 2, 12, nn.ReLU),
      Block(24, 24, 72, 3, 1, 0, nn.ReLU),
      Block(24, 32, 96, 5, 1, 24, nn.Hardswish),
      Block(32, 32, 96, 5, 1, 24, nn.Hardswish),
    )
    self.head = _conv_bn(32, 128, act=nn.Hardswish)
    self.classifier = nn.Linear(128, 10)

  def forward(self, x):
    x = self.head(self.blocks(self.stem(x)))
    x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
    return self.classifier(x)


def normalized(images: np.ndarray) -> torch.Tensor:
  """Returns the input, float32 [N, 1, H, W], of uint8 [N, H, W, 1] images."""
  x = torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32))
  return (x / 255 - MEAN) / STD


def augment(x: torch.Tensor, shift: int = 2) -> torch.Tensor:
  """Shifts and flips each image, float32 [B, C, H, W], at random."""
  count, _, height, width = x.shape
  flip = torch.rand(count) < 0.5
  x = torch.where(flip[:, None, None, None], x.flip(3), x)
  x = functional.pad(x, [shift] * 4, value=-MEAN / STD)
  tops, lefts = torch.randint(0, 2 * shift + 1, (2, count))
  rows = tops[:, None] + torch.arange(height)
  columns = lefts[:, None] + torch.arange(width)
  batch = torch.arange(count)[:, None, None]
  return x[batch, :, rows[:, :, None], columns[:, None]].movedim(-1, 1)


@torch.no_grad()
def top1(network: nn.Module, split: data.Images) -> float:
  """Returns the share of right answers, in percent."""
  network.eval()
  parts = normalized(split.images).split(500)
  answers = torch.cat([network(part).argmax(1) for part in parts])
  return 100 * float(np.mean(answers.numpy() == split.labels))


def train(
  network: nn.Module, split: data.Images, dev: data.Images, epochs, rate
):
  """Trains in place; prints the accuracy on `dev` after each pass."""
  x, labels = normalized(split.images), torch.from_numpy(split.labels).long()
  steps = len(x) // _BATCH
  # Weight decay applies to kernels only.
  kernels = [p for p in network.parameters() if p.ndim > 1]
  others = [p for p in network.parameters() if p.ndim == 1]
  optimizer = torch.optim.AdamW(
    [{'params': kernels}, {'params': others, 'weight_decay': 0.0}],
    weight_decay=0.02,
  )
  schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, rate, total_steps=epochs * steps, pct_start=0.2
  )
  start = time.time()
  for epoch in range(epochs):
    network.train()
    for rows in torch.randperm(len(x))[: steps * _BATCH].view(steps, _BATCH):
      given = augment(x[rows]).contiguous(memory_format=torch.channels_last)
      loss = functional.cross_entropy(
        network(given), labels[rows], label_smoothing=0.05
      )
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      schedule.step()
    print(
      f'epoch {epoch + 1}: loss {loss:.3f}, dev top-1 '
      f'{top1(network, dev):.2f}, {time.time() - start:.0f} s',
      flush=True,
    )


def export(network: nn.Module, file: pathlib.Path) -> None:
  """Writes the program of a network."""
  network = network.to(memory_format=torch.contiguous_format).eval()
  program = torch.export.export(network, (torch.zeros(2, 1, 28, 28),))
  for node in program.graph.nodes:
    node.meta.pop('stack_trace', None)  # paths on this machine
  torch.export.save(program, file)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--data', type=pathlib.Path, required=True, help='folder of IDX files')
  add('--output', type=pathlib.Path, required=True, help='file to write')
  add('--threads', type=int, default=1)
  add('--seed', type=int, default=0)
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  images, labels = data.read_fashion_mnist(args.data, 'train')
  dev = data.Images(images[-DEV_IMAGES:], labels[-DEV_IMAGES:])
  split = data.Images(images[:-DEV_IMAGES], labels[:-DEV_IMAGES])
  test = data.read_fashion_mnist(args.data, 't10k')
  torch.manual_seed(args.seed)
  network = SENetwork().to(memory_format=torch.channels_last)
  for cycle, (epochs, rate) in enumerate(_CYCLES, 1):
    train(network, split, dev, epochs, rate)
    torch.manual_seed(args.seed + cycle)
  export(network, args.output)
  weights = sum(p.numel() for p in network.parameters())
  print(
    f'{args.output}: {weights:,} weights, dev top-1 {top1(network, dev):.2f}, '
    f'test top-1 {top1(network, test):.2f}'
  )


if __name__ == '__main__':
  main()
