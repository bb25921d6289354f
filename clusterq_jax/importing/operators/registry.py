"""Which function translates which operator of torch."""

from collections.abc import Callable

from clusterq_jax.importing.translator import Handler

# By the operator's name, without the underscore of its in-place form.
HANDLERS: dict[str, Handler] = {}


def handles(names: str) -> Callable[[Handler], Handler]:
  """Registers a handler for operators, whose names have spaces between."""

  def register(handler: Handler) -> Handler:
    HANDLERS.update(dict.fromkeys(names.split(), handler))
    return handler

  return register
