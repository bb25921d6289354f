"""Files that are replaced as a whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Replaces a file once its new contents are complete and on the disk.

  If the block raises, the old file stays and the temporary file is removed.

  Args:
    path: the file to write or to replace.

  Yields:
    The temporary path to write to, in the same folder.

  Raises:
    OSError: the file cannot be written.
  """
  path = pathlib.Path(path)
  # A rename is atomic within one file system only. The process id keeps two
  # writers of one file apart.
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    with temporary.open('rb') as file:
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    # An error here would hide the one that the block raised.
    with contextlib.suppress(OSError):
      temporary.unlink()
