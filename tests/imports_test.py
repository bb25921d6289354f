"""Imports between the folders of the package run one way."""

import ast
import pathlib

import pytest

_PACKAGE = pathlib.Path(__file__).resolve().parents[1] / 'clusterq_jax'
# Each folder or file may import those above it.
_ORDER = (
  ('errors', 'atomic', 'precision', 'command_line', 'environment'),
  ('sharding',),
  ('ops',),
  ('models',),
  ('quant',),
  ('layers',),
  ('data',),
  ('weights',),
  ('importing',),
  ('config',),
  ('method',),
  ('deploy',),
  ('runtime',),
  ('report',),
  ('modes',),
  ('__init__', 'main', 'convert', 'pretrain'),
)
_LEVEL = {name: i for i, names in enumerate(_ORDER) for name in names}


def _folder(path: pathlib.Path) -> str:
  return path.relative_to(_PACKAGE).with_suffix('').parts[0]


def _imported(path: pathlib.Path) -> set[str]:
  """The folders and top-level modules of the package that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      package, *inner = node.module.split('.')
      if package == 'clusterq_jax':
        found |= {inner[0]} if inner else {alias.name for alias in node.names}
    elif isinstance(node, ast.Import):
      names = (alias.name.split('.') for alias in node.names)
      found |= {inner[0] for top, *inner in names if top == 'clusterq_jax'}
  return found


@pytest.mark.parametrize(
  'path',
  sorted(_PACKAGE.rglob('*.py')),
  ids=lambda path: str(path.relative_to(_PACKAGE)),
)
def test_a_file_imports_what_stands_above_it(path):
  if 'assets' in path.parts:
    return  # copied into exports; imports nothing of the package
  own = _folder(path)
  for other in _imported(path) - {own}:
    assert _LEVEL[other] < _LEVEL[own], f'{path} imports {other}'
