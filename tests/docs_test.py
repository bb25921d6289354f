"""Checks that the pages name only files, configs, fields and modes that exist.

It also checks the limits of README.md.
"""

import importlib.util
import pathlib
import re

import pytest
from absl import flags

from clusterq_jax import main
from clusterq_jax.config import fields, shipped

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PAGES = [
  'README.md',
  *sorted(f'docs/{path.name}' for path in (_ROOT / 'docs').glob('*.md')),
  'configs/README.md',
  'launch/README.md',
  'benchmarks/README.md',
]
_FOLDERS = (
  'benchmarks',
  'clusterq_jax',
  'configs',
  'docs',
  'launch',
  'tests',
)
# A file that docs/networks.md tells the reader to write.
_EXAMPLES = {'small_net.py'}
# Values of flags are the reader's own files, so the pattern excludes '='.
_PATH = re.compile(r'(?<![\w./:~*=-])(?:\./)?([A-Za-z_][\w-]*[\w./-]*)')
# Capitals stand for a value that the reader chooses.
_PLACEHOLDER = re.compile(r'\b[A-Z]{2,}\b')


def _files():
  """Returns every file of the project, and every folder with a '/'."""
  found = {path.name for path in _ROOT.iterdir() if path.is_file()}
  for folder in _FOLDERS:
    found.add(f'{folder}/')
    for path in (_ROOT / folder).rglob('*'):
      name = path.relative_to(_ROOT).as_posix()
      found.add(f'{name}/' if path.is_dir() else name)
  return found


_FILES = _files()
_PARTS = {name.split('/')[-2] for name in _FILES if name.endswith('/')}


def _code(text):
  """Returns the code of a page: fenced and indented blocks, and spans."""
  fenced = re.findall(r'^```.*?\n(.*?)^```', text, re.M | re.S)
  rest = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
  indented = re.findall(r'^ {4,}(\S.*)$', rest, re.M)
  return [*fenced, *indented, *re.findall(r'`([^`\n]+)`', rest)]


def _is_path(word):
  """Tells whether a word names a file or folder of the project."""
  if _PLACEHOLDER.search(word) or word in _EXAMPLES:
    return False
  if '/' in word:
    return word.split('/')[0] in _PARTS
  return word.endswith(('.py', '.sh', '.toml'))


def _exists(word):
  word = word.rstrip('.')
  names = (word, f'{word}/', f'{word}.py')  # configs and modules lack the .py
  return any(f'/{name}'.endswith(f'/{n}') for name in _FILES for n in names)


def _missing(text):
  """Returns the links, paths and modules of a page's text that do not exist."""
  words = {
    word
    for code in _code(text)
    for word in _PATH.findall(code)
    if _is_path(word.rstrip('.'))
  }
  modules = re.findall(
    r'python -m ((?:clusterq_jax|benchmarks)\.[a-z][\w.]*\w)', text
  )
  return sorted(
    [word for word in words if not _exists(word)]
    + [name for name in modules if importlib.util.find_spec(name) is None]
  )


def _bad_flags(text):
  """Returns the configs, fields and modes of a text that do not exist."""
  bad = []
  for name in re.findall(r'--config=([\w./-]+)', text):
    if name.startswith('configs/'):
      known = name in _FILES
    else:
      known = name in shipped.names() or name.endswith('.py') or name.isupper()
    if not known:
      bad.append(f'--config={name}')
  known = fields.meanings().keys() | {'section.field', 'FIELD'}
  for name in re.findall(r'--config\.([\w.]*\w)', text):
    if name not in known:
      bad.append(f'--config.{name}')
  assert main  # it defines the flag
  modes = {*flags.FLAGS['mode'].parser.enum_values, 'MODE'}
  for name in re.findall(r'--mode=(\w+)', text):
    if name not in modes:
      bad.append(f'--mode={name}')
  return bad


def _broken_links(page, text):
  """Returns the relative links of a page whose file or heading is missing."""
  broken = []
  text = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'\w+:', target):
      continue
    name, _, anchor = target.partition('#')
    path = (_ROOT / page).parent / name if name else _ROOT / page
    if not path.exists():
      broken.append(target)
    elif anchor:
      headings = re.findall(r'^#+ (.*)$', path.read_text(), re.M)
      slugs = {
        re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        for heading in headings
      }
      if anchor not in slugs:
        broken.append(target)
  return broken


@pytest.mark.parametrize('page', _PAGES)
def test_page(page):
  text = (_ROOT / page).read_text()
  assert not _broken_links(page, text)
  assert not _missing(text)
  assert not _bad_flags(text)


def test_finds_what_is_missing():
  text = """[a](absent.md) [b](README.md#absent) [c](https://example.com/absent)

`docs/absent.md` and `quant/absent.py` and `absent.sh` and `runs/mine/x.onnx`

    python -m benchmarks.absent --config=absent --config.quant.absent=1
    clusterq --config=configs/absent.py
    clusterq --config=mine.py --config=NAME --mode=absent --config.budget=1
    clusterq --config=resnet18 --mode=config

```
cat launch/absent.sh models/NAME.py launch/local.sh quant/plan.py
```
"""
  assert _broken_links('README.md', text) == ['absent.md', 'README.md#absent']
  assert _missing(text) == [
    'absent.sh',
    'benchmarks.absent',
    'docs/absent.md',
    'launch/absent.sh',
    'quant/absent.py',
  ]
  assert _bad_flags(text) == [
    '--config=absent',
    '--config=configs/absent.py',
    '--config.quant.absent',
    '--mode=absent',
  ]


def test_readme_is_short():
  text = (_ROOT / 'README.md').read_text()
  lines = text.splitlines()
  assert len(lines) <= 230
  assert len(text.split()) <= 1900
  # A table's row and a line with an address cannot be broken.
  broken = [line for line in lines if line[:1] != '|' and '](' not in line]
  assert max(map(len, broken)) <= 100
