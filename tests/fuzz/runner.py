"""Runs inputs in worker processes, one after the other, and watches them."""

import contextlib
import io
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from clusterq_jax.errors import InputError
from tests.fuzz.kinds import KINDS, kind_of
from tests.fuzz.seeds import Seeds

_HANG_S = 10.0  # of processor time
_WAIT_S = 180.0  # where it waits for something
_START_S = 120.0  # of a worker
_GROWTH = 3 * 2**28  # bytes of resident memory that one input may add
_ADDRESS_SPACE = 2**33  # and of address space


class _Watch:
  """Notes commands that are run, and files opened for writing elsewhere.

  Python tells of both before they happen; a look at the folders around finds
  what other code has written.
  """

  def __init__(self):
    self.folder = pathlib.Path('/')
    self.seen: list[str] = []
    sys.addaudithook(self._hook)

  def _hook(self, event: str, arguments: tuple) -> None:
    if event in ('os.system', 'os.exec', 'os.posix_spawn', 'subprocess.Popen'):
      self.seen.append(f'{event} {arguments[:2]!r:.200}')
    elif event == 'open' and isinstance(arguments[0], (str, bytes)):
      path, _, how = arguments
      writes = how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
      path = os.path.abspath(os.fsdecode(path))
      inside = path.startswith(f'{self.folder}/') or path == os.devnull
      if writes and not inside:
        self.seen.append(f'written: {path}')


def _memory(name: str) -> int:
  """A figure of /proc/self/status, bytes."""
  text = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.search(rf'{name}:\s+(\d+)', text)[1])


def _outcome(
  number: int, seed: int, seeds: Seeds, root: pathlib.Path, watch: _Watch
) -> tuple[str, str]:
  """('loaded' | 'refused' | 'finding', what was said)."""
  folder = root / 'inside' / 'input'
  folder.mkdir(parents=True)
  os.chdir(folder)
  random = np.random.default_rng([seed, number])
  found, said = 'loaded', ''
  before = _memory('VmRSS')
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak
  watch.folder, watch.seen = folder, []
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      KINDS[kind_of(number)](random, seeds, folder)
  except InputError as e:
    found, said = 'refused', str(e)
    if re.search(r'[\x00-\x1f\x7f]', said):
      found, said = 'finding', f'more than a line of text: {said!r}'
  except BaseException:
    found, said = 'finding', traceback.format_exc()
  grown = _memory('VmHWM') - before
  strays = [p for p in (root, root / 'inside') if len(list(p.iterdir())) != 1]
  if grown > _GROWTH:
    found, said = 'finding', f'{grown / 2**20:.0f} MiB of memory; {said}'
  if watch.seen or strays or pathlib.Path('/escaped').exists():
    found, said = 'finding', f'{watch.seen or "a file outside"}; {said}'
  watch.folder = root
  os.chdir(root)
  shutil.rmtree(root / 'inside')
  return found, said


def _work(
  connection, root: pathlib.Path, seed: int, numbers: Sequence[int], loud: bool
) -> None:
  """Sends an `_outcome` for each number, after a first one without meaning."""
  jax.config.update('jax_platforms', 'cpu')
  # The tests' shared programs would count as files written elsewhere.
  jax.config.update('jax_compilation_cache_dir', None)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = ''
  if not loud:  # decoders talk
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
  warnings.simplefilter('ignore')
  for name in ('seeds', 'around'):
    (root / name).mkdir()
  seeds = Seeds(root / 'seeds')
  watch = _Watch()
  limit = _memory('VmSize') + _ADDRESS_SPACE
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  connection.send(('', ''))
  for number in numbers:
    connection.send(_outcome(number, seed, seeds, root / 'around', watch))


class Result(NamedTuple):
  """What became of an input; outcome: 'loaded', 'refused' or 'finding'."""

  number: int
  kind: str
  outcome: str
  said: str


def _hangs(connection, pid: int) -> bool:
  """Waits for an outcome; whether that takes too long on however busy a CPU."""

  def used() -> float:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    ticks = sum(map(int, stat.rpartition(')')[2].split()[11:13]))
    return ticks / os.sysconf('SC_CLK_TCK')

  before, end = used(), time.monotonic() + _WAIT_S
  while not connection.poll(1):
    if used() - before > _HANG_S or time.monotonic() > end:
      return True
  return False


def run(
  seed: int, numbers: Sequence[int], loud: bool = False
) -> Iterator[Result]:
  """Tries the inputs of these numbers, in processes of their own.

  A process that dies or hangs is a finding, and another goes on after it.

  Args:
    seed: with an input's number it determines the input.
    numbers: of the inputs; a number also decides the kind.
    loud: whether the worker's own output is shown.

  Yields:
    One result per number, in their order.
  """
  context = multiprocessing.get_context('spawn')
  while numbers:
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    root = pathlib.Path(folder.name).resolve()
    here, there = context.Pipe(duplex=False)
    worker = context.Process(
      target=_work, args=(there, root, seed, numbers, loud)
    )
    worker.start()
    there.close()
    try:
      if not here.poll(_START_S):
        raise TimeoutError(f'the worker did not start in {_START_S} s')
      here.recv()
      while numbers:
        number, *numbers = numbers
        outcome, said = 'finding', f'took over {_HANG_S} s'
        hangs = _hangs(here, worker.pid)
        if not hangs:
          try:
            outcome, said = here.recv()
          except EOFError:
            worker.join()
            hangs, said = True, f'the process died: {worker.exitcode}'
        yield Result(number, kind_of(number), outcome, said)
        if hangs:
          break
    finally:
      worker.kill()
      worker.join()
      folder.cleanup()
