"""Chooses the entry of a file that fits an architecture.

Checkpoints wrap a state dict in various ways. The weights are the dictionary of
tensors that fits the architecture exactly once prefixes that all its keys share
are removed.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.weights import layouts
from clusterq_jax.weights.entries import Entry, join_names, shared_prefix
from clusterq_jax.weights.matching import match

# If several entries fit, one with a name from here is taken.
_USUAL = ('', 'state_dict', 'model')


@dataclasses.dataclass(frozen=True)
class Candidate:
  """An entry of a file with a prefix removed from its keys.

  Attributes:
    entry: the entry.
    prefix: the part removed from the front of every key.
    layout: the known layout that has most of the keys.
    keys: the keys without the prefix, without step counters.
  """

  entry: Entry
  prefix: str
  layout: layouts.Layout
  keys: tuple[str, ...]

  @property
  def matches(self) -> int:
    """Returns the number of keys that the layout has."""
    return self.layout.matches(self.keys)

  def fits(self, arch: str, metadata: Mapping[str, str]) -> bool:
    """Tells whether keys and shapes fit; reads no numbers."""
    shapes = self.entry.shapes.values()
    tensors = {
      key: np.broadcast_to(np.float32(0), shape)
      for key, shape in zip(self.keys, shapes, strict=True)
    }
    return not any(match(arch, self.layout, tensors, metadata).differences())


def choose(
  path: str,
  arch: str,
  entries: list[Entry],
  metadata: Mapping[str, str],
  entry: str,
) -> tuple[Candidate, list[str]]:
  """Chooses the entry to read.

  Args:
    path: path of the file, for messages.
    arch: name of the architecture.
    entries: the entries of the file.
    metadata: strings in the file's header.
    entry: name of the entry that the user wants; '' for any that fits.

  Returns:
    The entry that fits or, if none does, the one that comes closest. And the
    names of other entries that fit.

  Raises:
    InputError: no such entry, or no tensors.
  """
  wanted = [e for e in entries if entry in ('', e.name)]
  if not wanted:
    raise InputError(
      f'{path}: no entry {entry!r} with tensors (config.teacher.entry, '
      f'--entry); found {join_names(e.name or "the file" for e in entries)}'
    )
  candidates = []
  for found in wanted:
    prefix, keys = '', list(found.shapes)
    while keys:
      layout = max(layouts.known(arch), key=lambda known: known.matches(keys))
      candidates.append(Candidate(found, prefix, layout, tuple(keys)))
      more = shared_prefix(keys)
      if not more:
        break
      prefix, keys = prefix + more, [key.removeprefix(more) for key in keys]
  if not candidates:
    raise InputError(f'{path}: holds no tensors except step counters')
  fitting: dict[str, Candidate] = {}
  for candidate in candidates:
    if candidate.matches and candidate.fits(arch, metadata):
      fitting.setdefault(candidate.entry.name, candidate)
  if not fitting:
    return max(candidates, key=lambda c: (c.matches, len(c.keys))), []
  names = sorted(fitting, key=lambda name: name not in _USUAL)
  return fitting[names[0]], names[1:]


def describe(entries: list[Entry], chosen: Candidate) -> str:
  """Describes the contents of a file that does not fit; '' if they are plain.

  Args:
    entries: the entries of the file.
    chosen: the candidate that comes closest.
  """
  parts = []
  if len(entries) > 1:
    counts = (
      f'{len(entry.values)} tensors '
      + (f'in the entry {entry.name!r}' if entry.name else 'at the top level')
      for entry in entries[:4]
    )
    parts.append(f'the file holds {", ".join(counts)}')
  if prefix := shared_prefix(chosen.entry.shapes):
    parts.append(f'all keys start with {join_names([prefix])}')
  return '; '.join(parts)
