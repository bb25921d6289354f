"""Keeps compiled programs on disk, for all commands.

JAX's persistent compilation cache does the work. This module gives it a folder
for each kind of CPU, because a program may use instructions that another CPU
lacks. It also bounds the folder's size. JAX then locks the folder, so that
several processes can share it.
"""

import hashlib
import os
import pathlib
import platform
import sys

import filelock
import jax

_VARIABLE = 'JAX_COMPILATION_CACHE_DIR'
_DEFAULT = '~/.cache/clusterq-jax'
_CPU_INFO = pathlib.Path('/proc/cpuinfo')
_MOST_BYTES = 2 * 2**30
# Compilation time from which on a program is kept, in seconds.
_LEAST, _LEAST_S = 'jax_persistent_cache_min_compile_time_secs', 0.1


def enable() -> None:
  """Turns the cache on, or says in one line on stderr why it stays off.

  The folder is $JAX_COMPILATION_CACHE_DIR, else ~/.cache/clusterq-jax. An empty
  variable turns the cache off.
  """
  folder = os.environ.get(_VARIABLE, _DEFAULT)
  jax.config.update('jax_compilation_cache_dir', None)
  if not folder:
    return
  if '://' not in folder:
    path = pathlib.Path(folder).expanduser() / _cpu()
    folder = str(path)
    try:
      path.mkdir(parents=True, exist_ok=True)
      with filelock.FileLock(path / '.lockfile', timeout=10):  # JAX's own lock
        _remove_broken(path)
    except OSError as e:  # a lock that stays taken raises one, too
      print(
        f'{path}: cannot be written ({e.strerror or e}); compiled programs are '
        f'not kept. Set {_VARIABLE} to another folder',
        file=sys.stderr,
      )
      return
    jax.config.update('jax_compilation_cache_max_size', _MOST_BYTES)
  jax.config.update('jax_compilation_cache_dir', folder)
  if _LEAST.upper() not in os.environ:
    jax.config.update(_LEAST, _LEAST_S)


def _cpu() -> str:
  """Returns a name for CPUs with the same instructions."""
  found = {platform.machine()}
  if _CPU_INFO.exists():
    found |= {
      line
      for line in _CPU_INFO.read_text().splitlines()
      if line.lower().startswith(('flags', 'features', 'model', 'cpu part'))
    }
  digest = hashlib.blake2b('\n'.join(sorted(found)).encode(), digest_size=6)
  return f'{platform.machine()}-{digest.hexdigest()}'


def _remove_broken(folder: pathlib.Path) -> None:
  """Removes programs of processes that were killed while they wrote them.

  JAX writes a program and then the time of its use. It would never replace an
  incomplete program, and fails to find the oldest where a time is missing.
  """
  for program in folder.glob('*-cache'):
    time = program.with_name(program.name.removesuffix('-cache') + '-atime')
    if not time.exists():
      program.unlink(missing_ok=True)
