"""The exception for unusable user input, and checks of file sizes.

`main` turns an `InputError` into one line on stderr and exit code 2. Any other
exception is a defect and keeps its traceback.
"""

import os
import zipfile

_LARGE = 2**28  # bytes; files that expand to less are never refused


class InputError(ValueError):
  """Reports a file, a flag or a config value that cannot be used.

  The message is one line that names the input, the value found and the value
  expected. Characters that break the line or control a terminal are escaped.
  """

  def __init__(self, message: str):
    super().__init__(
      ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode()
        for c in message
      )
    )


def check_size(path: str, size: int) -> None:
  """Refuses a small file that expands to fill the memory.

  Args:
    path: path of a file of arrays.
    size: memory that its arrays take, in bytes.

  Raises:
    InputError: the ratio exceeds any real compression of arrays.
  """
  on_disk = os.path.getsize(path)
  if size > max(_LARGE, 100 * on_disk):
    raise InputError(
      f'{path}: {on_disk:,} bytes expand to {size:,} bytes, expected at most '
      '100 times the size of the file'
    )


def check_archive(path: str) -> None:
  """Applies `check_size` to a zip archive.

  Raises:
    InputError: see `check_size`.
    Exception: zipfile raises several kinds if the archive is damaged.
  """
  with zipfile.ZipFile(path) as archive:
    check_size(path, sum(info.file_size for info in archive.infolist()))
