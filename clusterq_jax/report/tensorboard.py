"""Writes the metrics of a run as an event file for TensorBoard."""

import importlib.util
import pathlib
import shutil
from typing import Any


def write_events(
  folder: pathlib.Path,
  lines: list[dict[str, float]],
  results: dict[str, Any],
) -> bool:
  """Writes scalars as a TensorBoard event file and replaces an earlier one.

  metrics.jsonl stores no times, so every scalar gets the time of writing.

  Args:
    folder: holds the event file and nothing else.
    lines: the lines of metrics.jsonl.
    results: content of results.json. Its top-1 accuracies and agreements are
      written at the last step.

  Returns:
    Whether the file was written; False if tensorboardX is not installed.
  """
  if importlib.util.find_spec('tensorboardX') is None:
    return False
  import tensorboardX  # optional

  final = {
    f'results/{network}/{figure}': results[network][figure]
    for network in ('teacher', 'student', 'deployed', 'synthetic')
    for figure in ('top1', 'agreement')
    if results.get(network, {}).get(figure) is not None
  }
  shutil.rmtree(folder, ignore_errors=True)
  with tensorboardX.SummaryWriter(str(folder)) as writer:
    for line in [*lines, {'step': results.get('steps', 0), **final}]:
      for tag, value in line.items():
        if tag != 'step':
          writer.add_scalar(tag, value, line['step'])
  return True
