"""Small charts as inline SVG: curves, scatter plots, heat maps.

Colours are told apart by colour-blind eyes (Okabe and Ito; Tol, muted), and
never alone: curves differ in dashes too, classes carry their number.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CURVES = ('#0072b2', '#d55e00', '#009e73')
_DASHES = ('', '7 3', '2 3')
CLASSES = (
  '#332288 #88ccee #44aa99 #117733 #999933 '
  '#ddcc77 #cc6677 #882255 #aa4499 #777777'
).split()
# Light to dark: a line of even steps in lightness, blue throughout.
_SHADES = np.array(
  [
    [247, 251, 255],
    [198, 219, 239],
    [107, 174, 214],
    [33, 113, 181],
    [8, 48, 107],
  ]
)
WIDE = 660  # two charts and the gap between them
_WIDTH, _HEIGHT = 324, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 40

# Of what is in the charts.
STYLE = """
svg text { font: 11px system-ui, sans-serif; fill: #333 }
svg text[fill] { fill: #fff }
svg .title { font-size: 12px; font-weight: 600 }
svg .small { font-size: 9.5px }
svg .middle { text-anchor: middle }
svg .end { text-anchor: end }
svg .halo { font-size: 14px; font-weight: 700; text-anchor: middle; fill: #000;
  stroke: #fff; stroke-width: 3px; paint-order: stroke }
svg .grid { stroke: #e4e7ea }
svg .axis { stroke: #666; fill: none }
svg .frame { stroke: #bbb; fill: none }
svg .mark { stroke: #888; stroke-dasharray: 3 3 }
svg .curve { fill: none; stroke-width: 1.8 }
"""


class Curve(NamedTuple):
  """name: for the legend; y: values at x, NaN where there is none."""

  name: str
  x: Sequence[float]
  y: Sequence[float]


def _text(
  x: float, y: float, text: str, style: str = '', extra: str = ''
) -> str:
  of = f' class="{style}"' if style else ''
  return f'<text x="{x:.1f}" y="{y:.1f}"{of}{extra}>{html.escape(text)}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
    f'height="{height:.0f}" role="img" aria-label="{html.escape(label)}">'
    f'{"".join(parts)}</svg>'
  )


def _ticks(low: float, high: float, log: bool) -> list[float]:
  """Round numbers within a range, about four; of a log range its powers."""
  if log:
    decades = range(
      math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    )
    steps = (1,) if math.log10(high / low) > 2.5 else (1, 3)
    found = [m * 10.0**e for e in decades for m in steps]
  else:
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(
      m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.99
    )
    first = math.ceil(low / step - 1e-9)
    found = [step * i for i in range(first, first + 9)]
  return [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]


def curves(
  title: str,
  of: Sequence[Curve],
  x_label: str,
  y_label: str,
  marks: Sequence[tuple[float, str]] = (),
  log: bool = False,
  width: int = _WIDTH,
) -> str:
  """Curves over one axis.

  Args:
    title: above the chart.
    of: up to three curves; a legend where they have names.
    x_label: name and unit of the axis.
    y_label: the same.
    marks: x and name of places to mark with a line.
    log: whether the y axis is logarithmic, all values being positive.
    width: of the chart, pixels.
  """
  xs = np.concatenate([np.asarray(c.x, float) for c in of])
  ys = np.concatenate([np.asarray(c.y, float) for c in of])
  xs, ys = xs[np.isfinite(ys)], ys[np.isfinite(ys)]
  x0, x1, y0, y1 = xs.min(), xs.max(), ys.min(), ys.max()
  if x0 == x1:
    x0, x1 = x0 - 0.5, x1 + 0.5
  if y0 == y1:
    y0, y1 = (y0 / 2, y1 * 2) if log else (y0 - 0.5, y1 + 0.5)
  if log:
    y0, y1 = y0 / 1.1, y1 * 1.1
  else:
    y0, y1 = y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0)
  legend = 16 if any(curve.name for curve in of) else 0
  top, height = _TOP + legend, _HEIGHT + legend
  bottom, right = height - _BOTTOM, width - _RIGHT
  scale = math.log if log else float

  def px(x: float) -> float:
    return _LEFT + (x - x0) / (x1 - x0) * (right - _LEFT)

  def py(y: float) -> float:
    share = (scale(y) - scale(y0)) / (scale(y1) - scale(y0))
    return bottom - share * (bottom - top)

  parts = [_text(_LEFT, 15, title, 'title')]
  for tick in _ticks(y0, y1, log):
    y = py(tick)
    parts += [
      f'<path class="grid" d="M{_LEFT} {y:.1f}H{right:.1f}"/>',
      _text(_LEFT - 5, y + 3.5, f'{tick:.4g}', 'end'),
    ]
  for tick in _ticks(x0, x1, log=False):
    parts.append(_text(px(tick), bottom + 15, f'{tick:.6g}', 'middle'))
  for x, name in marks:
    if x0 < x < x1:
      parts += [
        f'<path class="mark" d="M{px(x):.1f} {top}V{bottom}"/>',
        _text(px(x), top - 2, name, 'middle small'),
      ]
  where = _LEFT
  for curve, color, dash in zip(of, CURVES, _DASHES, strict=False):
    points = [
      (px(x), py(y))
      for x, y in zip(curve.x, curve.y, strict=True)
      if math.isfinite(y)
    ]
    line = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
    style = f'stroke="{color}" stroke-dasharray="{dash}"'
    parts.append(f'<polyline class="curve" {style} points="{line}"/>')
    if len(points) < 40:
      parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>'
        for x, y in points
      ]
    if legend:
      parts += [
        f'<path class="curve" {style} d="M{where} {top - 10}h22"/>',
        _text(where + 26, top - 6, curve.name),
      ]
      where += 40 + 6 * len(curve.name)
  parts += [
    f'<path class="axis" d="M{_LEFT} {top}V{bottom}H{right:.1f}"/>',
    _text((_LEFT + right) / 2, height - 6, x_label, 'middle'),
    _text(
      0,
      0,
      y_label,
      'middle',
      f' transform="translate(10 {(top + bottom) / 2:.0f}) rotate(-90)"',
    ),
  ]
  return _svg(width, height, title, parts)


def scatter(
  title: str,
  points: np.ndarray,
  groups: np.ndarray,
  low: np.ndarray,
  high: np.ndarray,
) -> str:
  """Points in a plane without units, coloured and numbered by group.

  Args:
    title: above the chart.
    points: [N, 2].
    groups: of each point, int [N], below `len(CLASSES)`.
    low: of both axes, [2].
    high: the same.
  """
  side, top = 236, 22
  shown = 6 + (points - low) / (high - low) * (side - 12) + [0, top]
  parts = [
    _text(1, 14, title, 'title'),
    f'<rect class="frame" x="0.5" y="{top}" width="{side}" height="{side}"/>',
  ]
  for group in np.unique(groups):
    dots = ''.join(
      f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>'
      for x, y in shown[groups == group]
    )
    parts.append(f'<g fill="{CLASSES[group]}" fill-opacity=".75">{dots}</g>')
  for group in np.unique(groups):
    x, y = np.median(shown[groups == group], 0)
    parts.append(_text(x, y + 4, str(group), 'halo'))
  return _svg(side + 1, side + top + 1, title, parts)


def shade(share: float) -> str:
  """A colour for a number from 0 (light) to 1 (dark)."""
  at = min(max(share, 0.0), 1.0) * (len(_SHADES) - 1)
  rgb = [np.interp(at, range(len(_SHADES)), channel) for channel in _SHADES.T]
  return f'#{"".join(f"{round(v):02x}" for v in rgb)}'


def heat_map(
  title: str, values: np.ndarray, largest: float, names: np.ndarray
) -> str:
  """A small square matrix with zeros along its diagonal.

  Args:
    title: above the chart.
    values: [K, K], from 0.
    largest: the value that is darkest.
    names: numbers of rows and columns, int [K].
  """
  cell, left, top = 21, 16, 34
  size = len(values)
  parts = [_text(left, 13, title, 'title')]
  for i in range(size):
    middle = (i + 0.5) * cell
    parts += [
      _text(left + middle, top - 5, str(names[i]), 'middle small'),
      _text(left - 5, top + middle + 3, str(names[i]), 'end small'),
    ]
    for j, value in enumerate(values[i]):
      share = value / largest
      x, y = left + j * cell, top + i * cell
      parts.append(
        f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" '
        f'fill="{shade(share)}"/>'
      )
      if i != j:
        ink = ' fill="#fff"' if share > 0.55 else ''
        parts.append(
          _text(x + cell / 2, y + 13.5, f'{value:.1f}', 'middle small', ink)
        )
  side = size * cell
  return _svg(left + max(side, 210) + 2, top + side + 2, title, parts)
