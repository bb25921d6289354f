"""Which tensors of a program share their memory.

A call in place, such as relu_, gives a new value to the tensor and to all that
share its memory. Only the tensor's own new value is followed: a part or another
view of it must not be read afterwards.
"""

from clusterq_jax.importing.program import Call


class Memory:
  """Notes views and calls in place, in the program's order."""

  def __init__(self) -> None:
    # The first name of a piece of memory, by name; and all names, by the first.
    self._first: dict[str, str] = {}
    self._sharing: dict[str, list[str]] = {}
    # Names of one and the same tensor, before and after calls in place.
    self._twins: dict[str, list[str]] = {}
    self._overwritten: dict[str, Call] = {}

  def writer(self, name: str) -> Call | None:
    """Returns the call that overwrote what a name stood for."""
    return self._overwritten.get(name)

  def share(self, name: str, call: Call) -> None:
    """Notes that a call's results are views of a tensor."""
    first = self._first.get(name, name)
    self._first |= dict.fromkeys(call.outputs, first)
    self._sharing.setdefault(first, [first]).extend(call.outputs)

  def overwrite(self, name: str, call: Call) -> list[str]:
    """Notes that a call gave a tensor a new value.

    Returns:
      All names that stand for the new value.
    """
    first = self._first.get(name, name)
    self._overwritten |= dict.fromkeys(self._sharing.get(first, []), call)
    twins = [*self._twins.get(name, [name]), *call.outputs]
    for twin in twins:
      self._overwritten.pop(twin, None)
    self._twins |= dict.fromkeys(twins, twins)
    self._first |= dict.fromkeys(twins, first)
    self._sharing[first] = [first, *twins]
    return twins
