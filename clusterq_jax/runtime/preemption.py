"""Saves the state when the process receives SIGTERM.

Clusters send SIGTERM some seconds before they take a machine away.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):  # noqa: N818
  """Reports that a run received SIGTERM and saved its state.

  The message is for users.
  """


@contextlib.contextmanager
def notice() -> Iterator[Callable[[], bool]]:
  """Keeps SIGTERM from ending the process inside the `with` block.

  Yields:
    A function to call whenever steps are finished. It returns whether to save
    and stop now, and it does not block. In a distributed run, every process has
    to call it after the same steps. All processes then stop after the same
    call, whichever of them received the signal.
  """
  if jax.distributed.is_initialized():
    # JAX handles the signal and makes the processes agree on the number after
    # the largest so far. They must not skip it, so they count calls, not steps.
    calls = itertools.count(1)
    yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
  elif threading.current_thread() is not threading.main_thread():
    yield lambda: False  # only the main thread may handle signals
  else:
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
      yield told.is_set
    finally:
      signal.signal(signal.SIGTERM, before)
