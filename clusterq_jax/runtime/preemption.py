"""SIGTERM: the step is finished and saved before the process ends.

Clusters send it some seconds before they take a machine away.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):  # noqa: N818
  """A run was told to stop and has saved its state; the text is for users."""


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
  """Within it, SIGTERM ends nothing.

  Yields:
    A function to call after every step, with the number of steps done: whether
    to save and stop there. It waits for nothing. Of several processes all have
    to call it; they all stop after the same step, whichever got the signal.
  """
  if jax.distributed.is_initialized():
    # JAX listens by itself, and makes the processes agree in the background.
    yield multihost_utils.reached_preemption_sync_point
  elif threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # only the main thread may ask for signals
  else:
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
      yield lambda step: told.is_set()
    finally:
      signal.signal(signal.SIGTERM, before)
