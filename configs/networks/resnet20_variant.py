"""Example of your own network: a variant of ResNet-20.

It differs from ResNet-20 in four ways: a wider stem, a convolution as shortcut
in the first block of every stage, no activation after an add except at the end
of a stage, and a classifier on averages of 4x4 windows. `register` makes it
known to the package; see docs/networks.md.
"""

import jax
from flax import linen as nn

import clusterq_jax as cq


class Variant(nn.Module):
  """Network of three stages with three blocks each, for 32x32 pixels.

  Attributes:
    layers: layers to build the network from, float or fake-quantized.
    num_classes: number of classes K.
  """

  layers: cq.LayerSet
  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [B, 32, 32, 3] to logits [B, K]."""
    layers = self.layers
    x = layers.input(name='input')(x)
    x = layers.conv_bn(64, 3, act='relu', name='stem')(x)
    for stage, width in enumerate((16, 32, 64), 1):
      for block in (1, 2, 3):
        strides = 2 if stage > 1 and block == 1 else 1
        name = f'stage{stage}_block{block}'
        y = layers.conv_bn(
          width, 3, strides=strides, act='relu', name=f'{name}_conv1'
        )(x)
        y = layers.conv_bn(width, 3, name=f'{name}_conv2')(y)
        if block == 1:
          x = layers.conv_bn(
            width, 1, strides=strides, name=f'{name}_shortcut'
          )(x)
        act = 'relu' if block == 3 else None
        x = layers.add(act=act, name=f'{name}_add')(x, y)
    x = layers.avg_pool(kernel=4, strides=4, name='pool')(x)
    return layers.dense(self.num_classes, name='classifier')(x)


# Names in the weights file of each layer's convolution and BatchNorm. Keys are
# layer names without the block's prefix. {s} is the stage, from 1, and {i} the
# block, from 0.
_ROWS = {
  'stem': ('conv1', 'bn1'),
  'conv1': ('layer{s}.{i}.conv1', 'layer{s}.{i}.bn1'),
  'conv2': ('layer{s}.{i}.conv2', 'layer{s}.{i}.bn2'),
  'shortcut': ('layer{s}.{i}.shortcut.0', 'layer{s}.{i}.shortcut.1'),
  'classifier': ('linear', 'linear'),
}


def register():
  """Makes the network known to configs and students."""
  cq.register_network(
    'resnet20_variant',
    Variant,
    _ROWS,
    cq.Preprocessing(
      image_size=(32, 32),
      mean=(0.507, 0.487, 0.441),
      std=(0.267, 0.256, 0.276),
    ),
  )
