"""Sets what the command line needs before JAX is imported.

This module imports nothing but the standard library.
"""

import os
import pathlib
import sys

_COMMANDS = {'clusterq_jax.main', 'clusterq'}
# Tells whether the kernel gives a process huge pages: always, if the process
# asks for them (madvise), or never.
_HUGE_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def prepare() -> None:
  """Prepares the process of a command line; may start its program again.

  XLA and the C library read their variables once, when they start. A process
  that imports the package as a library is left as it is. Variables that are set
  already keep their values.
  """
  arguments = sys.orig_argv
  if not _COMMANDS & {pathlib.Path(name).name for name in arguments[:4]}:
    return
  # The command line reports long compilations itself.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  missing = {k: v for k, v in malloc().items() if k not in os.environ}
  if missing and sys.executable:
    os.environ.update(missing)
    # The same process, with the same number.
    os.execv(sys.executable, [sys.executable, *arguments[1:]])


def malloc() -> dict[str, str]:
  """Returns the variables that give a process huge pages on a CPU.

  XLA takes new memory from the C library for every step, and the kernel has to
  clear it page by page. Huge pages cut a fifth off the time of a step (measured
  with glibc 2.36). glibc 2.35 and newer heed the variable.

  Returns:
    Variables by name; empty where they would change nothing.
  """
  if _HUGE_PAGES.exists() and '[madvise]' in _HUGE_PAGES.read_text():
    return {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
  return {}
