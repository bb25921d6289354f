"""State dicts and files that the tests of weights start from."""

import os

import numpy as np
import pytest
import safetensors.numpy

from clusterq_jax.errors import InputError

_STATS = ('weight', 'bias', 'running_mean', 'running_var')


def akamaster(blocks=3, channels=3, classes=10, conv_shortcut=False):
  """A state dict written out from the source's model, not from our table."""
  random = np.random.RandomState(0)
  state = {}

  def conv_bn(conv, bn, *shape):
    state[f'{conv}.weight'] = random.randn(*shape).astype(np.float32)
    for stat in _STATS:
      state[f'{bn}.{stat}'] = random.rand(shape[0]).astype(np.float32)
    state[f'{bn}.num_batches_tracked'] = np.array(7, np.int64)

  conv_bn('conv1', 'bn1', 16, channels, 3, 3)
  cin = 16
  for stage, width in ((1, 16), (2, 32), (3, 64)):
    for i in range(blocks):
      name = f'layer{stage}.{i}'
      conv_bn(f'{name}.conv1', f'{name}.bn1', width, cin, 3, 3)
      conv_bn(f'{name}.conv2', f'{name}.bn2', width, width, 3, 3)
      if conv_shortcut and cin != width:
        conv_bn(f'{name}.shortcut.0', f'{name}.shortcut.1', width, cin, 1, 1)
      cin = width
  state['linear.weight'] = random.randn(classes, 64).astype(np.float32)
  state['linear.bias'] = random.randn(classes).astype(np.float32)
  return state


def pytorchcv(state):
  """The same tensors under pytorchcv's names."""
  renamed = {}
  for key, value in state.items():
    parts = key.split('.')
    if parts[0] == 'linear':
      key = f'output.{parts[1]}'
    elif parts[0] in ('conv1', 'bn1'):
      key = f'features.init_block.{parts[0][:-1]}.{parts[1]}'
    else:
      unit = f'features.stage{parts[0][-1]}.unit{int(parts[1]) + 1}'
      if parts[2] == 'shortcut':
        kind = ('conv', 'bn')[int(parts[3])]
        key = f'{unit}.identity_conv.{kind}.{parts[4]}'
      else:
        kind, number = parts[2][:-1], parts[2][-1]
        key = f'{unit}.body.conv{number}.{kind}.{parts[3]}'
    renamed[key] = value
  return renamed


def save(path, state, metadata=None):
  safetensors.numpy.save_file(state, path, metadata)
  return path


def refusal(function, *args):
  """The one line that `function` refuses its arguments with."""
  with pytest.raises(InputError) as caught:
    function(*args)
  message = str(caught.value)
  assert '\n' not in message
  assert str(args[0]) in message
  return message


class Touch:
  """Creates a file when unpickled: stands for any code."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)
