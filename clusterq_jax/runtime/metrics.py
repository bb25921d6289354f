"""Reports on a run: metrics.jsonl, a progress bar, JSON files, a table."""

import ctypes
import errno
import json
import os
import pathlib
import resource
import sys
import threading
import time
from typing import Any

import tqdm

from clusterq_jax import sharding
from clusterq_jax.atomic import atomic
from clusterq_jax.errors import InputError

_SILENCE_S = 20.0  # between lines where there is no terminal


class MetricsFile:
  """Writer of metrics.jsonl, with one line per logged step, in order."""

  def __init__(self, path: pathlib.Path, step: int):
    """Opens the file and drops its lines after the restored step.

    The resumed run writes these lines again, with the same values.

    Args:
      path: path of the file; it need not exist.
      step: number of finished steps.
    """
    self._path = path
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _step(line) <= step]
    if len(kept) != len(lines):
      with atomic(path) as temporary:
        temporary.write_text(''.join(f'{line}\n' for line in kept))
    self._file = path.open('ab', buffering=0)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Appends a line; a full disk leaves no partial line.

    Args:
      step: number of finished steps.
      values: metrics by name; they are rounded to seven digits.

    Raises:
      OSError: the disk is full.
    """
    rounded = {k: float(f'{v:.7g}') for k, v in sorted(values.items())}
    line = json.dumps({'step': step, **rounded}).encode() + b'\n'
    whole = self._file.seek(0, os.SEEK_END)
    if self._file.write(line) < len(line):
      self._file.truncate(whole)
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


def _step(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return float('inf')  # an incomplete line


def read(path: pathlib.Path) -> list[dict[str, float]]:
  """Returns the complete lines of metrics.jsonl; [] if there is no file."""
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if _step(line) < float('inf')]


class Progress:
  """Progress bar on a terminal; elsewhere one line every 20 seconds."""

  def __init__(
    self, total: int, done: int, images_per_step: int, silent: bool = False
  ):
    """Starts to measure time.

    Args:
      total: number of steps of the run.
      done: number of steps that are finished already.
      images_per_step: batch size.
      silent: whether to print nothing.
    """
    self._silent = silent
    self._total, self._start, self._done = total, done, done
    self._images = images_per_step
    self._began = self._said = time.monotonic()
    self._bar = None
    if sys.stderr.isatty() and not silent:
      self._bar = tqdm.tqdm(
        total=total, initial=done, unit='step', smoothing=0.05
      )

  def update(self, done: int, phase: str, values: dict[str, float]) -> None:
    """Shows the number of finished steps, the phase, losses and agreement."""
    if self._silent:
      return
    shown = {
      k.split('/')[-1] if k.endswith('agreement') else k: f'{v:.3f}'
      for k, v in values.items()
      if k.endswith('/loss') or k == 'student/agreement'
    }
    step, self._done = done - self._done, done
    now = time.monotonic()
    if self._bar is not None:
      self._bar.set_description(phase)
      self._bar.set_postfix(shown)
      self._bar.update(step)
    elif now - self._said > _SILENCE_S or done == self._total:
      self._said = now
      rate = (done - self._start) / (now - self._began)
      left = (self._total - done) / rate if rate else float('inf')
      facts = ', '.join(f'{k} {v}' for k, v in shown.items())
      print(
        f'{phase}: step {done}/{self._total}, {rate * self._images:.0f} '
        f'images/s, {left:.0f} s left, {facts}',
        file=sys.stderr,
        flush=True,
      )

  def say(self, text: str) -> None:
    """Prints a line to stderr without breaking the bar."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif not self._silent:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Leaves the bar as it is and ends its line."""
    if self._bar is not None:
      self._bar.close()


class Waiting:
  """Context manager that reports on stderr every 20 s that a call still runs.

  In a distributed run, only the lead process reports.

  Args of the constructor:
    what: the call, such as 'compiling student step'.
  """

  def __init__(self, what: str):
    self._what = what
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._speak, daemon=True)

  def _speak(self) -> None:
    began = time.monotonic()
    while not self._done.wait(_SILENCE_S):
      seconds = time.monotonic() - began
      print(f'{self._what}: {seconds:.0f} s so far', file=sys.stderr)

  def __enter__(self) -> None:
    if sharding.is_lead():
      self._thread.start()

  def __exit__(self, *_: object) -> None:
    self._done.set()
    if self._thread.ident is not None:
      self._thread.join()


def peak_rss_mb() -> float:
  """Returns the peak resident memory of this process so far, in MB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  scale = 1e6 if sys.platform == 'darwin' else 1e3
  return round(peak / scale, 1)


def release_memory() -> None:
  """Returns freed memory to the system, which glibc would keep.

  XLA's compiler frees hundreds of MB. Kept in pieces, they add up.
  """
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:
    trim(0)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON atomically."""
  with atomic(path) as temporary:
    temporary.write_text(json.dumps(value, indent=2) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    OSError: the file cannot be read.
    InputError: the file does not hold a JSON object.
  """
  try:
    value = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as e:
    raise InputError(f'{path}: not JSON ({e}); expected a JSON object') from e
  if not isinstance(value, dict):
    raise InputError(
      f'{path}: found a {type(value).__name__}; expected a JSON object'
    )
  return value


def table(rows: list[tuple[str, str]]) -> str:
  """Formats (name, value) rows as two aligned columns."""
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'  {name:<{width}}  {value}' for name, value in rows)
