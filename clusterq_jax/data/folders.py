"""Finds the images of a folder and their labels.

Two layouts of a folder are known: a sub-folder of images per class, or a table
`labels.csv` with the header `file,label`. Files of the table are relative to
`images/` in the folder or to the folder itself.
"""

import csv
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from clusterq_jax.data.image_files import SUFFIXES, ImageFiles
from clusterq_jax.errors import InputError

_LABELS = 'labels.csv'
# Folders and files that operating systems and tools leave behind.
_SYSTEM = ('__MACOSX', '__pycache__', 'System Volume Information', 'lost+found')
_SYSTEM_STARTS = ('.', '@', '$')


def read_folder(
  folder: str,
  shape: tuple[int, int, int],
  resize: int,
  num_classes: int,
  class_names: Sequence[str] = (),
) -> tuple[ImageFiles, np.ndarray]:
  """Returns the images of a folder and their labels, int32 [N].

  Args:
    folder: a folder with class folders or with labels.csv.
    shape: (H, W, C) to crop to.
    resize: see `ImageFiles`.
    num_classes: K.
    class_names: K names of classes, or none.

  Raises:
    InputError: no such folder, neither layout in it, or class folders that
      do not tell which class they are.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise InputError(f'eval.path={folder!r}: no such folder')
  if (root / _LABELS).exists():
    paths, labels = _from_csv(root)
  else:
    paths, labels = _from_classes(root, num_classes, class_names)
  files = ImageFiles(
    paths.__getitem__,
    lambda index: str(paths[index]),
    (len(paths), *shape),
    resize,
  )
  return files, np.array(labels, np.int32)


def _from_classes(
  root: pathlib.Path, num_classes: int, class_names: Sequence[str]
) -> tuple[list[pathlib.Path], list[int]]:
  """Returns paths and labels; prints the rule that gave the labels."""
  folders = [path for path in _visible(root) if path.is_dir()]
  files = [_visible(folder) for folder in folders]
  images = [
    [path for path in found if path.suffix.lower() in SUFFIXES]
    for found in files
  ]
  if not any(images):
    raise InputError(
      f'{root}: found no images; expected a sub-folder of images per class, or '
      f'{_LABELS} with the header file,label'
    )
  names = [folder.name for folder in folders]
  labels, rule = _labels_of(root, names, num_classes, class_names)
  others = [
    path.name
    for found, kept in zip(files, images, strict=True)
    for path in sorted(set(found) - set(kept))
  ]
  if others:
    rule += f'; skipped {len(others)} files that are not images ('
    rule += ', '.join(others[:3]) + ', ...' * (len(others) > 3) + ')'
  print(f'{root}: {rule}', file=sys.stderr)
  return (
    [path for found in images for path in found],
    [label for label, found in zip(labels, images, strict=True) for _ in found],
  )


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  """Lists a folder in order of names, without what systems leave behind."""
  return [
    path
    for path in sorted(folder.iterdir())
    if path.name not in _SYSTEM and not path.name.startswith(_SYSTEM_STARTS)
  ]


def _labels_of(
  root: pathlib.Path,
  names: list[str],
  num_classes: int,
  class_names: Sequence[str],
) -> tuple[list[int], str]:
  """Returns the label of each class folder and the rule that gave it.

  The first rule that applies counts:

    1. Folders are named by the names of the classes.
    2. Folders are named by their labels.
    3. There is one folder for every class, and their order gives the labels.

  Raises:
    InputError: no rule applies.
  """
  # A folder's name cannot contain a slash.
  number = {n.replace('/', '_'): label for label, n in enumerate(class_names)}
  unknown = [name for name in names if name not in number]
  if class_names and not unknown and len(number) == len(class_names):
    return [number[name] for name in names], (
      'class folders have the class names of the weights file'
    )
  if all(name.isascii() and name.isdecimal() for name in names):
    labels = [int(name) if len(name) < 10 else 10**9 for name in names]
    wrong = [n for n, k in zip(names, labels, strict=True) if k >= num_classes]
    if wrong:
      raise InputError(
        f'{root}: class folder {wrong[-1]!r}: expected numbers from 0 to '
        f'{num_classes - 1}; labels count from 0, not from 1'
      )
    return labels, 'class folders are named by their labels'
  if 0 < len(unknown) < len(names):
    raise InputError(
      f'{root}: class folder {unknown[0]!r} is no class of the weights file, '
      f'but {len(names) - len(unknown)} others are; expected names of classes '
      f'only ({", ".join(class_names[:3])}, ...)'
    )
  if len(names) != num_classes:
    raise InputError(
      f'{root}: {len(names)} class folders ({", ".join(names[:3])}, ...) for '
      f'{num_classes} classes; expected one for each class, or folders named '
      f'by their labels, 0 to {num_classes - 1}, or by the class names of the '
      'weights file'
    )
  return list(range(num_classes)), (
    f'class folders in the order of their names are labels 0 ({names[0]}) to '
    f'{num_classes - 1} ({names[-1]})'
  )


def _from_csv(root: pathlib.Path) -> tuple[list[pathlib.Path], list[int]]:
  """Returns the paths and labels of a table."""
  table = root / _LABELS
  bases = [path for path in (root / 'images', root) if path.is_dir()]
  paths, labels = [], []
  # Spreadsheets write a byte order mark, and some write semicolons or tabs.
  with table.open(newline='', encoding='utf-8-sig', errors='replace') as file:
    head = file.readline()
    file.seek(0)
    delimiter = max(',;\t', key=head.count)
    rows = csv.DictReader(file, delimiter=delimiter)
    try:
      columns = [name.strip().lower() for name in rows.fieldnames or ()]
      if not {'file', 'label'} <= set(columns):
        raise InputError(
          f'{table}: columns are {rows.fieldnames}; expected file,label'
        )
      rows.fieldnames = columns
      for row in rows:
        label = (row['label'] or '').strip()
        name = (row['file'] or '').strip()
        if not name or not (label.isdecimal() and len(label) < 10):
          raise InputError(
            f'{table}: line {rows.line_num}: file {row["file"]!r}, label '
            f'{label!r}; expected a file name and a class number'
          )
        places = [base / name for base in bases]
        paths.append(next(filter(os.path.exists, places), places[0]))
        labels.append(int(label))
    except csv.Error as e:
      raise InputError(f'{table}: line {rows.line_num}: {e}') from e
  if not paths:
    raise InputError(f'{table}: holds no images; expected a line for each')
  return paths, labels
