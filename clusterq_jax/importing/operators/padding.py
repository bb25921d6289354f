"""Padding and cropping."""

from clusterq_jax.importing.layer import Layer
from clusterq_jax.importing.operators.registry import handles
from clusterq_jax.importing.translator import Feature, Translator

Pair = tuple[int, int]
_MOST_CROPPED = 16  # rows or columns; a crop becomes a kernel of that size


def window_sizes(t: Translator, sizes, kernel, strides, pads, dilation=1):
  """Returns height and width of what a window gives."""
  if min(n for pair in pads for n in pair) < 0:
    t.refuse('it has a negative padding')
  if max(*kernel, *(n for pair in pads for n in pair)) > 2**15:
    t.refuse('its window is too large')
  return [
    (size + sum(pair) - dilation * (k - 1) - 1) // strides + 1
    for size, k, pair in zip(sizes, kernel, pads, strict=True)
  ]


def padded(t: Translator, x: Layer, pads, value: float = 0.0) -> Layer:
  """Adds a constant around the map: ((top, bottom), (left, right))."""
  c, h, w = x.shape
  (top, bottom), (left, right) = pads
  shape = (c, h + top + bottom, w + left + right)
  if max(shape[1:]) > 2**15:
    t.refuse(f'its result is {list(shape)}')
  return t.add('pad', [x], shape, padding=tuple(pads), value=value)


def more_channels(t: Translator, x: Layer, before: int, after: int) -> Layer:
  """Adds channels of zeros before and after those of the map."""
  c, h, w = x.shape
  shape = (c + before + after, h, w)
  return t.add('pad_channels', [x], shape, before=before, after=after)


def cropped(
  t: Translator, value: Feature, vertical: Pair, horizontal: Pair
) -> Feature:
  """Takes rows and columns off the map: (before, after) of each."""
  x = value.layer
  if x.op == 'crop':
    # Of one crop after another, the first will have no reader.
    vertical, horizontal = (
      (a + c, b + d)
      for (a, b), (c, d) in zip(
        x.options['margins'], (vertical, horizontal), strict=True
      )
    )
    (x,) = x.inputs
  c, h, w = x.shape
  shape = (c, h - sum(vertical), w - sum(horizontal))
  if max(sum(vertical), sum(horizontal)) > _MOST_CROPPED:
    t.refuse(
      f'it crops {h}x{w} pixels to {shape[1]}x{shape[2]}, and only up to '
      f'{_MOST_CROPPED} rows and columns can be cropped'
    )
  layer = t.add('crop', [x], shape, margins=(vertical, horizontal))
  return Feature(layer, (value.shape[0], *shape))


@handles('pad constant_pad_nd')
def _pad(t: Translator) -> Feature:
  value, x = t.feature(), t.map()
  pads = t.integers('pad', (), None)
  mode = t.plain('mode', 'constant')
  if mode != 'constant':
    t.refuse(f'padding of mode {mode!r:.20}, and only zeros can be imported')
  if len(pads) % 2 or len(pads) > 8 or len(value.shape) != 4:
    t.refuse(f'its pad is {pads}')
  fill = t.plain('value')
  fill = 0.0 if fill is None else fill
  # torch counts axes from the last.
  pairs = list(zip(pads[::2], pads[1::2], strict=True))
  pairs += [(0, 0)] * (4 - len(pairs))
  horizontal, vertical, channels, batch = pairs
  if batch != (0, 0) or type(fill) not in (int, float):
    t.refuse(f'its pad is {pads} with {fill!r:.20}')
  if min(*vertical, *horizontal, *channels) < 0:
    if max(*vertical, *horizontal, *channels) > 0 or channels != (0, 0):
      t.refuse(f'it pads and crops at once: {pads}')
    (top, bottom), (left, right) = vertical, horizontal
    return cropped(t, value, (-top, -bottom), (-left, -right))
  if vertical != (0, 0) or horizontal != (0, 0):
    x = padded(t, x, (vertical, horizontal), fill)
  if channels != (0, 0):
    if fill != 0:
      t.refuse(f'it pads channels with {fill}, and only zeros can be imported')
    x = more_channels(t, x, *channels)
  return Feature(x, (value.shape[0], *x.shape))
