"""The one exception that means: the user gave something that cannot be used.

`main` turns it into one line on stderr and exit code 2. Everything else that
is raised is a defect and keeps its traceback.
"""

import os
import zipfile

_LARGE = 2**28  # bytes


class InputError(ValueError):
  """Bad user input: a file, a flag or a config value.

  The message is a single line that names the input, what was found and what
  was expected. What would break the line, or command a terminal, is escaped.
  """

  def __init__(self, message: str):
    super().__init__(
      ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode()
        for c in message
      )
    )


def check_size(path: str, size: int) -> None:
  """Refuses a small file that would fill the memory.

  Args:
    path: of a file of arrays.
    size: bytes that its arrays take.

  Raises:
    InputError: that is far more than any real arrays are compressed.
  """
  on_disk = os.path.getsize(path)
  if size > max(_LARGE, 100 * on_disk):
    raise InputError(
      f'{path}: {on_disk:,} bytes that stand for {size:,}, expected at most a '
      'hundred times the file'
    )


def check_archive(path: str) -> None:
  """`check_size` for a zip archive. Raises zipfile's errors, too."""
  with zipfile.ZipFile(path) as archive:
    check_size(path, sum(info.file_size for info in archive.infolist()))
