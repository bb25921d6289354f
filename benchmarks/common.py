"""What several benchmarks share: paths, how runs start, machine and commit."""

import datetime
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Real weights and images, where the tests find them.
DATA = pathlib.Path(
  os.environ.get('CLUSTERQ_TEST_DATA') or ROOT.parent / 'shared' / 'data'
)


def start(
  module: str,
  *arguments: str,
  folder: pathlib.Path = ROOT,
  variables: dict[str, str] | None = None,
  **kwargs: Any,
) -> subprocess.Popen:
  """Starts `python -m MODULE` in a folder, with huge pages as in `clusterq`.

  Args:
    module: name of the module.
    *arguments: its command line.
    folder: working directory.
    variables: environment variables to add.
    **kwargs: of `subprocess.Popen`.
  """
  # Here, because a process that times PyTorch does not import JAX.
  from clusterq_jax import environment

  return subprocess.Popen(
    [sys.executable, '-m', module, *arguments],
    cwd=folder,
    env={**environment.malloc(), **os.environ, **(variables or {})},
    **kwargs,
  )


def machine() -> dict[str, Any]:
  """Returns the CPU's name and the number of cores for this process."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  models = [x.split(': ')[1] for x in lines if x.startswith('model name')]
  ours = getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count()))(0)
  return {'cpu': (models or [platform.machine()])[0], 'cores': len(ours)}


def commit() -> str:
  """Returns the commit of the code, with '+' if the code has changed since."""
  if shutil.which('git') is None:
    return 'unknown'

  def git(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ['git', '-C', str(ROOT), *args], capture_output=True, text=True
    )

  name = git('rev-parse', '--short', 'HEAD').stdout.strip() or 'unknown'
  changed = git('diff', '--quiet', 'HEAD', '--', 'clusterq_jax', 'configs')
  return name + '+' * bool(changed.returncode)


def provenance() -> dict[str, Any]:
  """Returns what a record must hold about a figure that was just measured."""
  return {
    'kind': 'measured',
    'commit': commit(),
    'date': datetime.date.today().isoformat(),
    'machine': machine() | {'load': load_average()},
  }


def load_average() -> float:
  """Returns the mean number of running processes over the last minute."""
  return round(os.getloadavg()[0], 2)


def spread(values: Sequence[float], form: str = '.3f') -> str:
  """Writes the median of several values, and their range."""
  median, low, high = statistics.median(values), min(values), max(values)
  return f'{median:{form}} ({low:{form}}-{high:{form}})'
