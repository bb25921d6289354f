"""Loads a teacher's weights from a file if they fit the architecture exactly.

Whatever is missing, left over or of another shape is reported in one line.
"""

import dataclasses
import os

import numpy as np

from clusterq_jax.errors import InputError
from clusterq_jax.models import registry
from clusterq_jax.models.graph import trace
from clusterq_jax.weights import (
  checks,
  choosing,
  files,
  graph_weights,
  layouts,
)
from clusterq_jax.weights.entries import join_names
from clusterq_jax.weights.graph_weights import Loaded
from clusterq_jax.weights.matching import match

# Format of files without a graph, which earlier versions wrote.
FORMAT = 'clusterq-jax teacher 1'


def load(path: str | os.PathLike[str], arch: str, entry: str = '') -> Loaded:
  """Reads the weights of one architecture and refuses all that does not fit.

  Args:
    path: a file that `files.read_entries` takes.
    arch: a name from `models.registry`; files with a graph ignore it, and ''
      takes only those.
    entry: name of the dictionary in the file to read, such as 'model_ema'; ''
      for the one that fits.

  Raises:
    InputError: an unknown architecture, an unreadable file, no such entry,
      tensors missing, left over or of another shape, no BatchNorm statistics, a
      negative variance, or an unsupported number of channels or classes.
  """
  path = os.fspath(path)
  if arch:
    layouts.known(arch)  # refuses an unknown one before any reading
  entries, metadata = files.read_entries(path)
  if 'graph' in metadata:
    loaded = graph_weights.load(path, entries[0].read(), metadata)
    if arch in ('', metadata.get('arch')):
      return loaded
    note = (
      f'{path}: the network is the one in the file; '
      f'config.teacher.arch={arch} is not used.'
    )
    return dataclasses.replace(loaded, notes=(*loaded.notes, note))
  if not arch:
    raise InputError(
      f'{path}: carries no graph of its network: convert it first, see '
      'docs/networks.md, or set config.teacher.arch'
    )
  chosen, others = choosing.choose(path, arch, entries, metadata, entry)
  try:
    loaded = _load(path, arch, chosen, metadata)
  except InputError as e:
    found = choosing.describe(entries, chosen)
    raise InputError(f'{e}; {found}' if found else str(e)) from e
  report, notes = loaded.report, loaded.notes
  if len(entries) > 1:
    left = (repr(e.name) for e in entries if e is not chosen.entry)
    report += (
      f' Read the entry {chosen.entry.name!r}; not read: {join_names(left)} '
      "('' is the top level)."
    )
  if others:
    notes += (
      f'{path}: the weights are from the entry {chosen.entry.name!r}; '
      f'{join_names(map(repr, others))} would fit as well '
      '(config.teacher.entry, or --entry of clusterq_jax.convert, chooses).',
    )
  return dataclasses.replace(loaded, report=report, notes=notes)


def _load(
  path: str, arch: str, chosen: choosing.Candidate, metadata: dict[str, str]
) -> Loaded:
  """Reads and checks the weights of one candidate."""
  layout = chosen.layout
  checks.check_kind(path, chosen.keys)
  tensors = {
    key.removeprefix(chosen.prefix): value
    for key, value in chosen.entry.read().items()
  }
  if 2 * layout.matches(tensors) < len(tensors):
    known = ', '.join(layout.name for layout in layouts.known(arch))
    raise InputError(
      f'{path}: found tensors of no layout known for {arch} '
      f'({join_names(tensors, 3)}), expected one of {known}; '
      f'{registry.HOW_TO_BRING_YOUR_OWN}'
    )
  if layout is layouts.OWN:
    _check_metadata(path, metadata, arch)
  found = match(arch, layout, tensors, metadata)
  if layout.torch_order:
    checks.check_order(path, found)
  checks.check_fit(path, found)
  checks.check_values(path, found)
  checks.check_channels(path, found.in_channels)
  checks.check_classes(path, found.options['num_classes'])
  params: dict[str, dict[str, np.ndarray]] = {}
  statistics: dict[str, dict[str, np.ndarray]] = {}
  variables = {'params': params, 'batch_stats': statistics}
  for layer in found.layers:
    for leaf in layer.shapes:
      value = layout.to_flax(found.tensors[layout.key(layer, leaf)])
      group = variables[layouts.COLLECTIONS[leaf]]
      group.setdefault(layer.name, {})[leaf] = value
  assert found.in_channels is not None
  details = ', '.join(
    f'{name}={value}'
    for name, value in {
      'in_channels': found.in_channels,
      **found.options,
    }.items()
  )
  report = (
    f'{path}: {arch} in the {layout.name} layout, {details}; '
    f'{sum(v.size for p in params.values() for v in p.values()):,} parameters, '
    f'{len(statistics)} BatchNorm layers with '
    f'{sum(s["mean"].size for s in statistics.values()):,} channels.'
  )
  return Loaded(
    trace(registry.builder(arch, **found.options)),
    variables,
    found.in_channels,
    found.options['num_classes'],
    metadata,
    layout.name,
    report,
    checks.untrained(path, statistics),
  )


def _check_metadata(path: str, metadata: dict[str, str], arch: str) -> None:
  """Refuses a file of our own that is of another format or architecture."""
  if metadata.get('format') != FORMAT:
    raise InputError(
      f'{path}: metadata format is {metadata.get("format")!r}, expected '
      f'{FORMAT!r}'
    )
  found = metadata.get('arch')
  if found != arch:
    advice = f'; set config.teacher.arch={found}' * (found in registry.names())
    raise InputError(
      f'{path}: metadata arch is {found!r}, expected {arch!r}{advice}'
    )
