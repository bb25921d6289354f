"""ResNet for ImageNet (He et al. 2015, table 1): 18, 34 and 50 layers.

Four stages have 64 to 512 channels. The output of a bottleneck has four times
as many. torchvision's ResNet-50 has the stride of a bottleneck in its 3x3
convolution ("v1.5"). The paper's has it in the first 1x1 convolution.
"""

import jax
from flax import linen as nn

from clusterq_jax.models import protocol

WIDTHS = (64, 128, 256, 512)
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_EXPANSION = 4


class ResNet(nn.Module):
  """Residual stages after a 7x7 convolution and a max pool.

  Attributes:
    layers: factories of the layers.
    depth: number of weighted layers on the main path: 18, 34 or 50.
    num_classes: length of the logits.
    stride_first: whether a bottleneck has its stride in its first convolution.
  """

  layers: protocol.LayerSet
  depth: int
  num_classes: int
  stride_first: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] to logits [B, num_classes]."""
    layers = self.layers
    x = layers.input(name='input')(x)
    x = layers.conv_bn(64, 7, strides=2, act='relu', name='stem')(x)
    x = layers.max_pool(kernel=3, strides=2, padding=1, name='stem_pool')(x)
    for stage, width in enumerate(WIDTHS, 1):
      for block in range(1, BLOCKS[self.depth][stage - 1] + 1):
        strides = 2 if stage > 1 and block == 1 else 1
        name = f'stage{stage}_block{block}'
        if self.depth < 50:
          y, features = self._basic(x, width, strides, name), width
        else:
          y = self._bottleneck(x, width, strides, name)
          features = _EXPANSION * width
        if block == 1 and (stage > 1 or features != width):
          x = layers.conv_bn(
            features, 1, strides=strides, name=f'{name}_shortcut'
          )(x)
        x = layers.add(act='relu', name=f'{name}_add')(x, y)
    x = layers.global_avg_pool(name='pool')(x)
    return layers.dense(self.num_classes, name='classifier')(x)

  def _basic(self, x, width, strides, name):
    conv_bn = self.layers.conv_bn
    x = conv_bn(width, 3, strides=strides, act='relu', name=f'{name}_conv1')(x)
    return conv_bn(width, 3, name=f'{name}_conv2')(x)

  def _bottleneck(self, x, width, strides, name):
    conv_bn = self.layers.conv_bn
    first, second = (strides, 1) if self.stride_first else (1, strides)
    x = conv_bn(width, 1, strides=first, act='relu', name=f'{name}_conv1')(x)
    x = conv_bn(width, 3, strides=second, act='relu', name=f'{name}_conv2')(x)
    return conv_bn(_EXPANSION * width, 1, name=f'{name}_conv3')(x)
