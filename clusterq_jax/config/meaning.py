"""Describes what a config field means and which values it accepts."""

import dataclasses
import inspect
from typing import Any, NamedTuple


class Bounds(NamedTuple):
  """Range of accepted numbers.

  Attributes:
    low: smallest accepted number.
    high: largest accepted number, or the limit if `below` is True.
    below: whether numbers must be smaller than `high`.
  """

  low: float
  high: float
  below: bool = False

  def __contains__(self, value: object) -> bool:
    assert isinstance(value, (int, float))
    return self.low <= value <= self.high and not (
      self.below and value == self.high
    )

  def __str__(self) -> str:
    return f'{self.low:,} to {"below " * self.below}{self.high:,}'


class Meaning(NamedTuple):
  """Description and accepted values of a field.

  Attributes:
    doc: description for users.
    bounds: range of the number, or of each number of a tuple.
    choices: accepted strings; () accepts any.
    length: length of a tuple; None accepts any.
    recipe: value at budget 1 of a field whose default None scales with the
      budget; None for other fields.
  """

  doc: str
  bounds: Bounds | None = None
  choices: tuple[str, ...] = ()
  length: int | None = None
  recipe: int | None = None


def field(default: Any, bounds: Bounds | None = None, **more: Any) -> Any:
  """Makes a dataclass field; the class docstring holds its meaning."""
  return dataclasses.field(default=default, metadata={'bounds': bounds, **more})


def documented(section: Any) -> dict[str, str]:
  """Parses the attributes of a section's docstring, by name."""
  _, _, listed = (inspect.getdoc(section) or '').partition('Attributes:\n')
  found: dict[str, str] = {}
  name = ''
  for line in listed.splitlines():
    if line.startswith('    '):  # continues the previous attribute
      found[name] += f' {line.strip()}'
    else:
      name, _, text = line.strip().partition(': ')
      found[name] = text
  return found
