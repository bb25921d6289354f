"""MobileNetV2 (Sandler et al. 2018) and EfficientNet-Lite (Google, 2020).

Both are stages of inverted residual blocks: 1x1 expansion, depthwise
convolution, linear 1x1 projection, an add where shapes allow; ReLU6. The Lite
networks are EfficientNets (Tan and Le 2019) without squeeze-and-excitation;
stem, head, first and last stage keep their size at every scale. Their padding
and BatchNorm epsilon are TensorFlow's.
"""

import dataclasses
import math

import jax
from flax import linen as nn

from clusterq_jax.models import protocol


@dataclasses.dataclass(frozen=True)
class Stage:
  """Blocks of one output width: the first has the strides."""

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
  def features(n):
    # To a multiple of 8, at least nine tenths of the exact width.
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
    layers: what the network is built from.
    stages: of the network.
    num_classes: length of the logits.
    padding: of 3x3 and 5x5 convolutions: None or 'same'; see `LayerSet`.
    epsilon: of every BatchNorm.
    expand_first: blocks of expansion 1 have an expanding convolution too, as
      in pytorchcv.
  """

  layers: protocol.LayerSet
  stages: tuple[Stage, ...]
  num_classes: int
  padding: protocol.Padding = None
  epsilon: float = protocol.EPSILON
  expand_first: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes]."""
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
