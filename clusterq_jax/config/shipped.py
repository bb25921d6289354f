"""Finds shipped config files by name."""

import difflib
import pathlib

from clusterq_jax.errors import InputError

_PACKAGE = pathlib.Path(__file__).parents[1]
# The first folder exists in the wheel, the second in a checkout.
_FOLDERS = (_PACKAGE / 'configs', _PACKAGE.parent / 'configs')
_MOVED = {
  'cifar10_resnet20': 'paper/cifar10_resnet20',
  'cifar100_resnet20': 'paper/cifar100_resnet20',
}


def names() -> list[str]:
  """Returns the names of the shipped configs, such as paper/resnet18."""
  found = {
    str(path.relative_to(folder).with_suffix(''))
    for folder in _FOLDERS
    for path in [*folder.glob('*.py'), *folder.glob('paper/*.py')]
  }
  return sorted(found)


def find(config: str) -> str:
  """Returns the path of a config file.

  Args:
    config: a path that ends in .py, or the name of a shipped config.

  Raises:
    InputError: there is no such file.
  """
  path = pathlib.Path(config)
  if path.suffix == '.py' and path.exists():
    return config
  stem = path.with_suffix('').name if path.suffix == '.py' else config
  if path.suffix != '.py':
    for folder in _FOLDERS:
      file = folder / f'{config}.py'
      if config in names() and file.exists():
        return str(file)
  if stem in _MOVED:
    hint = f"the paper's schedule moved to --config={_MOVED[stem]}"
    if f'{stem}_fast' in names():
      hint += f'; the short recipe is --config={stem}_fast'
  else:
    close = difflib.get_close_matches(stem, names(), n=1)
    hint = f'did you mean --config={close[0]}? ' if close else ''
    hint += f'The shipped configs are {", ".join(names())}'
  raise InputError(f'--config={config}: no such file; {hint}')
