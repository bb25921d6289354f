"""The count of lines of code."""

from benchmarks import lines

_TEXT = '''"""Docstring,

in two lines."""

# A comment.
def f():  # not a comment alone
  """Docstring."""
  return """
# in a string
"""
'''


def test_count():
  assert lines.count(_TEXT) == (4, 3, 1)
