"""ResNet for small images (He et al. 2015, section 4.2): 6n + 2 layers.

Shortcuts that change the shape are parameter-free (subsample, pad channels) or
a convolution with BatchNorm. The architecture has no default preprocessing,
because published weights expect different inputs.
"""

import jax
from flax import linen as nn

from clusterq_jax.models import protocol

WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
  """Three stages of n two-convolution blocks at 16, 32 and 64 channels.

  Attributes:
    layers: factories of the layers.
    depth: number of weighted layers on the main path, 6n + 2.
    num_classes: length of the logits.
    shortcut: 'pad' (parameter-free) or 'conv' (1x1 convolution + BatchNorm).
  """

  layers: protocol.LayerSet
  depth: int
  num_classes: int
  shortcut: str = 'pad'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] to logits [B, num_classes]."""
    layers = self.layers
    x = layers.input(name='input')(x)
    x = layers.conv_bn(WIDTHS[0], 3, act='relu', name='stem')(x)
    for stage, width in enumerate(WIDTHS, 1):
      for block in range(1, (self.depth - 2) // 6 + 1):
        strides = 2 if stage > 1 and block == 1 else 1
        name = f'stage{stage}_block{block}'
        y = layers.conv_bn(
          width, 3, strides=strides, act='relu', name=f'{name}_conv1'
        )(x)
        y = layers.conv_bn(width, 3, name=f'{name}_conv2')(y)
        if strides > 1:
          x = self._shortcut(x, width, strides, f'{name}_shortcut')
        x = layers.add(act='relu', name=f'{name}_add')(x, y)
    x = layers.global_avg_pool(name='pool')(x)
    return layers.dense(self.num_classes, name='classifier')(x)

  def _shortcut(self, x, width, strides, name):
    if self.shortcut == 'pad':
      factory = self.layers.pad_shortcut(
        features=width, strides=strides, name=name
      )
    else:
      factory = self.layers.conv_bn(width, 1, strides=strides, name=name)
    return factory(x)
