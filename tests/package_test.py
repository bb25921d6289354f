"""What users see of the package."""

import pathlib
import pkgutil
import tomllib

import clusterq_jax as cq

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_public_names_are_no_modules():
  modules = {module.name for module in pkgutil.iter_modules(cq.__path__)}
  assert modules.isdisjoint(cq.__all__)
  for name in cq.__all__:
    assert hasattr(cq, name)
    assert getattr(cq, name).__doc__


def test_the_wheel_has_every_folder():
  project = tomllib.loads((_ROOT / 'pyproject.toml').read_text())
  packages = project['tool']['setuptools']['packages']
  folders = {
    str(file.parent.relative_to(_ROOT)).replace('/', '.')
    for top in ('clusterq_jax', 'configs')
    for file in (_ROOT / top).rglob('*.py')
  }
  expected = {
    f'clusterq_jax.{name}' if name.startswith('configs') else name
    for name in folders
  }
  assert set(packages) == expected


def test_examples_need_nothing_from_inner_modules():
  for file in (_ROOT / 'configs').rglob('*.py'):
    text = file.read_text()
    assert 'from clusterq_jax' not in text, file
    assert 'import clusterq_jax.' not in text, file
