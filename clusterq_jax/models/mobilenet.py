"""MobileNetV2 (Sandler et al. 2018) and EfficientNet-Lite (Google, 2020).

Both are stages of inverted residual blocks with ReLU6: 1x1 expansion, depthwise
convolution, linear 1x1 projection, and an add where shapes allow it. The Lite
networks are EfficientNets (Tan and Le 2019) without squeeze-and-excitation.
Their stem, head, first and last stage have the same size at every scale. Their
padding and BatchNorm epsilon are TensorFlow's.
"""

import dataclasses
import math

import jax
from flax import linen as nn

from clusterq_jax.models import protocol


@dataclasses.dataclass(frozen=True)
class Stage:
  """A sequence of blocks with the same output width.

  Attributes:
    expansion: ratio of a block's inner width to its input channels.
    features: output channels of every block.
    blocks: number of blocks.
    strides: stride of the first block in pixels; the others have 1.
    kernel: side of the depthwise kernels in pixels.
  """

  expansion: int
  features: int
  blocks: int
  strides: int
  kernel: int = 3


MOBILENET_V2 = (
  Stage(1, 16, 1, 1),
  Stage(6, 24, 2, 2),
  Stage(6, 32, 3, 2),
  Stage(6, 64, 4, 2),
  Stage(6, 96, 3, 1),
  Stage(6, 160, 3, 2),
  Stage(6, 320, 1, 1),
)
_EFFICIENTNET = (
  Stage(1, 16, 1, 1),
  Stage(6, 24, 2, 2),
  Stage(6, 40, 2, 2, 5),
  Stage(6, 80, 3, 2),
  Stage(6, 112, 3, 1, 5),
  Stage(6, 192, 4, 2, 5),
  Stage(6, 320, 1, 1),
)


def _scaled(width: float, depth: float) -> tuple[Stage, ...]:
  """Multiplies the channels and the number of blocks of EfficientNet-B0."""

  def features(n):
    # Rounds to a multiple of 8 that is at least 0.9 times the exact width.
    nearest = max(8, int(n * width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * n * width else nearest

  last = len(_EFFICIENTNET) - 1
  return tuple(
    dataclasses.replace(
      stage,
      features=features(stage.features),
      blocks=stage.blocks
      if i in (0, last)
      else math.ceil(depth * stage.blocks),
    )
    for i, stage in enumerate(_EFFICIENTNET)
  )


EFFICIENTNET_LITE = tuple(
  _scaled(width, depth)
  for width, depth in ((1, 1), (1, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))
)


class MobileNet(nn.Module):
  """Inverted residual stages between a 3x3 stem and a 1x1 head.

  Attributes:
    layers: factories of the layers.
    stages: the stages from input to output.
    num_classes: length of the logits.
    padding: padding of 3x3 and 5x5 convolutions: None or 'same'; see
      `LayerSet`.
    epsilon: epsilon of every BatchNorm.
    expand_first: whether blocks with expansion 1 have an expanding convolution,
      as in pytorchcv.
  """

  layers: protocol.LayerSet
  stages: tuple[Stage, ...]
  num_classes: int
  padding: protocol.Padding = None
  epsilon: float = protocol.EPSILON
  expand_first: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] to logits [B, num_classes]."""
    layers = self.layers
    x = layers.input(name='input')(x)
    x = self._conv(32, 3, 'stem', strides=2, act='relu6')(x)
    channels = 32
    for s, stage in enumerate(self.stages, 1):
      for b in range(1, stage.blocks + 1):
        strides = stage.strides if b == 1 else 1
        name = f'stage{s}_block{b}'
        y = self._block(x, channels, stage, strides, name)
        if strides == 1 and channels == stage.features:
          y = layers.add(name=f'{name}_add')(x, y)
        x, channels = y, stage.features
    x = self._conv(1280, 1, 'head', act='relu6')(x)
    x = layers.global_avg_pool(name='pool')(x)
    return layers.dense(self.num_classes, name='classifier')(x)

  def _conv(self, features, kernel, name, **options):
    padding = self.padding if kernel > 1 else None
    return self.layers.conv_bn(
      features,
      kernel,
      padding=padding,
      epsilon=self.epsilon,
      name=name,
      **options,
    )

  def _block(self, x, channels, stage, strides, name):
    wide = stage.expansion * channels
    if stage.expansion > 1 or self.expand_first:
      x = self._conv(wide, 1, f'{name}_expand', act='relu6')(x)
    x = self._conv(
      wide,
      stage.kernel,
      f'{name}_depthwise',
      strides=strides,
      groups=wide,
      act='relu6',
    )(x)
    return self._conv(stage.features, 1, f'{name}_project')(x)
