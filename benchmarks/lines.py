"""Counts lines of code, docstrings and comments, by folder.

    python -m benchmarks.lines [REV]

REV is a git revision; without it, the script counts the working tree. A line of
code is not blank, not a comment alone, and not part of a docstring.
"""

import ast
import collections
import io
import pathlib
import subprocess
import sys
import tokenize

ROOT = pathlib.Path(__file__).resolve().parent.parent
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def count(text: str) -> tuple[int, int, int]:
  """Returns the numbers of lines of code, docstrings and comments."""
  docstrings: set[int] = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
      first = node.body[0]
      docstrings.update(range(first.lineno, (first.end_lineno or 0) + 1))
  comments = {
    token.start[0]
    for token in tokenize.generate_tokens(io.StringIO(text).readline)
    if token.type == tokenize.COMMENT and token.line.strip().startswith('#')
  }
  filled = {i for i, line in enumerate(text.split('\n'), 1) if line.strip()}
  code = filled - docstrings - comments
  return len(code), len(filled & docstrings), len(comments)


def _git(*args: str) -> str:
  return subprocess.check_output(['git', '-C', str(ROOT), *args], text=True)


def main() -> None:
  rev = sys.argv[1] if len(sys.argv) > 1 else None
  tree = f'ls-tree -r --name-only {rev}'
  listing = tree if rev else 'ls-files -co --exclude-standard'
  totals: dict = collections.defaultdict(collections.Counter)
  for name in _git(*listing.split()).splitlines():
    if not name.endswith('.py') or not (rev or (ROOT / name).exists()):
      continue
    text = _git('show', f'{rev}:{name}') if rev else (ROOT / name).read_text()
    top, *inner = name.split('/')[:-1] or ['.']
    for folder in {'all', top, '/'.join([top, *inner[:1]])}:
      totals[folder].update(dict(enumerate(count(text))))
  print(f'{"folder":32} {"code":>7} {"docstrings":>11} {"comments":>9}')
  for folder, total in sorted(totals.items()):
    print(f'{folder:32} {total[0]:7,} {total[1]:11,} {total[2]:9,}')


if __name__ == '__main__':
  main()
