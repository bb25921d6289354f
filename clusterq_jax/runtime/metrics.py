"""What a run says while it goes: metrics.jsonl, a progress bar, a table."""

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

from clusterq_jax.atomic import atomic
from clusterq_jax.errors import InputError

_SILENCE_S = 20.0  # between lines where there is no terminal


class MetricsFile:
  """metrics.jsonl: one line per logged step, in order.

  On resume, lines after the restored step are dropped: they are written again,
  with the same values.
  """

  def __init__(self, path: pathlib.Path, step: int):
    self._path = path
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _step(line) <= step]
    if len(kept) != len(lines):
      with atomic(path) as temporary:
        temporary.write_text(''.join(f'{line}\n' for line in kept))
    self._file = path.open('ab', buffering=0)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Appends a line, or, where the disk is full, nothing.

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
    return float('inf')  # a line cut short


def read(path: pathlib.Path) -> list[dict[str, float]]:
  """The lines of metrics.jsonl; none without it, nor one cut short."""
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if _step(line) < float('inf')]


class Progress:
  """A bar on a terminal; elsewhere a line every twenty seconds."""

  def __init__(
    self, total: int, done: int, images_per_step: int, silent: bool = False
  ):
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
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif not self._silent:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


class Waiting:
  """Says on stderr, every twenty seconds, what a long call is still doing."""

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
    self._thread.start()

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._thread.join()


def peak_rss_mb() -> float:
  """Largest resident memory of this process so far, MB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  scale = 1e6 if sys.platform == 'darwin' else 1e3
  return round(peak / scale, 1)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON atomically."""
  with atomic(path) as temporary:
    temporary.write_text(json.dumps(value, indent=2) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    OSError: it cannot be read.
    InputError: it holds something else.
  """
  try:
    value = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as e:
    raise InputError(f'{path}: not JSON: {e}') from e
  if not isinstance(value, dict):
    raise InputError(
      f'{path}: found a {type(value).__name__}; expected a JSON object'
    )
  return value


def table(rows: list[tuple[str, str]]) -> str:
  """Two aligned columns."""
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'  {name:<{width}}  {value}' for name, value in rows)
