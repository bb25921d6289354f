"""Counts lines of code, docstrings and comments, by folder.

    python -m benchmarks.lines [REV]

REV is a git revision; without it, the script counts the working tree. A line of
code is not blank, not a comment alone, and not part of a docstring.
"""

import argparse
import ast
import collections
import io
import pathlib
import subprocess
import tokenize

ROOT = pathlib.Path(__file__).resolve().parent.parent
_WITH_DOCSTRING = (
  ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
)  # fmt: skip


def count(text: str) -> tuple[int, int, int]:
  """Returns the numbers of lines of code, docstrings and comments."""
  docstrings: set[int] = set()
  for node in ast.walk(ast.parse(text)):
    if (
      isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node) is not None
    ):
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('rev', nargs='?', help='the working tree unless given')
  rev = parser.parse_args().rev

  def git(*args: str) -> str:
    return subprocess.check_output(['git', '-C', str(ROOT), *args], text=True)

  listing = (
    ['ls-tree', '-r', '--name-only', rev] if rev else ['ls-files', '-co']
  )
  totals: collections.Counter = collections.Counter()
  for name in filter(lambda n: n.endswith('.py'), git(*listing).splitlines()):
    if rev is None and not (ROOT / name).exists():
      continue  # deleted, and not yet committed
    counts = count(
      git('show', f'{rev}:{name}') if rev else (ROOT / name).read_text()
    )
    folders = name.split('/')[:-1][:2]
    for i in range(len(folders) + 1):
      totals.update(
        {('/'.join(folders[:i]) or 'all', k): n for k, n in enumerate(counts)}
      )
  print(f'{"folder":32} {"code":>7} {"docstrings":>11} {"comments":>9}')
  for folder in sorted({folder for folder, _ in totals}):
    code, docstrings, comments = (totals[folder, k] for k in range(3))
    print(f'{folder:32} {code:7,} {docstrings:11,} {comments:9,}')


if __name__ == '__main__':
  main()
