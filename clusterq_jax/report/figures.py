"""Draws the charts of the report with matplotlib, as inline SVG.

Every function returns one `<svg>` element for an HTML page. The same values
give the same text: there is no date and no random identifier. Text stays text,
so that the browser can search it. Colour-blind readers can tell the colours
apart (Okabe and Ito; Tol, muted), and colour is never the only cue: curves also
differ in dashes and markers, and classes carry their number.
"""

import html
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
  LogLocator,
  MaxNLocator,
  NullLocator,
  StrMethodFormatter,
)

CLASSES = (
  '#332288 #88ccee #44aa99 #117733 #999933 '
  '#ddcc77 #cc6677 #882255 #aa4499 #777777'
).split()
_CURVES = (('#0072b2', '-', 'o'), ('#d55e00', '--', 's'), ('#009e73', ':', '^'))
_INK, _GREY = '#222222', '#666666'
_PX = 1 / 96  # inches per CSS pixel
# Widths of charts, CSS pixels, for a page of 984 with gaps of 12.
WIDE, HALF, THIRD, _QUARTER = 800, 486, 320, 237
_DENSE = 40  # from this number of points on, a curve has no markers
_STYLE = {
  'axes.edgecolor': _GREY,
  'axes.formatter.useoffset': False,
  'axes.grid': True,
  'axes.labelcolor': _INK,
  'axes.labelsize': 8,
  'axes.linewidth': 0.8,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.axisbelow': True,
  'font.family': 'sans-serif',
  # matplotlib warns about each family in this list that it does not find.
  'font.sans-serif': ['DejaVu Sans'],
  'font.size': 8,
  'grid.color': '#e4e7ea',
  'svg.fonttype': 'none',
  'text.color': _INK,
  # Names of layers may contain a dollar sign.
  'text.parse_math': False,
  'xtick.color': _GREY,
  'xtick.labelcolor': _INK,
  'xtick.labelsize': 8,
  'ytick.color': _GREY,
  'ytick.labelcolor': _INK,
  'ytick.labelsize': 8,
}
# 'default' resets what a matplotlibrc on this machine sets.
_styled = matplotlib.style.context(['default', _STYLE])


class Curve(NamedTuple):
  """One line of a chart.

  Attributes:
    name: text of the legend; '' for a chart with one curve.
    x: positions.
    y: values at `x`; NaN where there is none.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]


def _figure(
  title: str, size: tuple[int, int], margins: tuple[int, int, int, int]
) -> tuple[Figure, Axes]:
  """Makes a titled figure with one plot.

  Fixed margins align the plots of neighbouring figures.

  Args:
    title: text at the top left.
    size: width and height, CSS pixels.
    margins: left, right, top and bottom of the plot, CSS pixels.
  """
  width, height = size
  left, right, top, bottom = margins
  figure = Figure(figsize=(width * _PX, height * _PX))
  figure.text(2 / width, 1 - 3 / height, title, size=9, weight='bold', va='top')
  axes = figure.add_axes(
    (
      left / width,
      bottom / height,
      (width - left - right) / width,
      (height - top - bottom) / height,
    )
  )
  return figure, axes


def _inline(figure: Figure, title: str) -> str:
  """Returns a figure as an `<svg>` element that can stand beside others.

  Args:
    figure: what to draw.
    title: label for screen readers. It also seeds the identifiers, so that
      figures of different titles have different identifiers.
  """
  file = io.StringIO()
  with matplotlib.rc_context({'svg.hashsalt': title}):
    nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    figure.savefig(file, format='svg', metadata=nothing)
  # The XML prolog and the attributes of the root mean nothing inside HTML.
  _, _, root = file.getvalue().partition('<svg')
  _, _, body = root.partition('>')
  # This rule would style the whole page.
  body = re.sub(r'<style.*?</style>', '', body, flags=re.DOTALL)
  # Nothing refers to the identifiers of groups, which every figure repeats.
  body = re.sub(r'<g id="[^"]*"', '<g', body)
  width, height = figure.get_size_inches()
  return (
    f'<svg viewBox="0 0 {72 * width:.2f} {72 * height:.2f}" '
    f'width="{width / _PX:.0f}" height="{height / _PX:.0f}" role="img" '
    f'aria-label="{html.escape(title)}">{body}'
  )


@_styled
def curves(
  title: str,
  lines: Sequence[Curve],
  x_label: str,
  y_label: str,
  marks: Sequence[tuple[float, str]] = (),
  log: bool = False,
  width: int = THIRD,
) -> str:
  """Draws up to three curves over one axis.

  Args:
    title: text above the chart, unlike that of any other figure of the page.
    lines: the curves; named curves get a legend.
    x_label: name and unit of the x axis, whose values are integers.
    y_label: name and unit of the y axis.
    marks: positions and names of vertical lines; those outside are left out.
    log: whether the y axis is logarithmic; all values are then positive.
    width: width of the chart, CSS pixels.
  """
  legend = any(line.name for line in lines)
  top = 28 + 18 * legend + 12 * bool(marks)
  figure, axes = _figure(title, (width, 182 + top), (62, 10, top, 40))
  for line, (color, dash, marker) in zip(lines, _CURVES, strict=False):
    there = np.isfinite(line.y)
    axes.plot(
      np.asarray(line.x)[there],
      np.asarray(line.y)[there],
      label=line.name,
      color=color,
      linestyle=dash,
      marker=marker if there.sum() < _DENSE else '',
      markersize=3,
      linewidth=1.4,
    )
  if log:
    _log_ticks(axes)
  axes.xaxis.set_major_locator(
    MaxNLocator(width // 64, steps=[1, 2, 5, 10], integer=True)
  )
  axes.set(xlabel=x_label, ylabel=y_label)
  _mark(axes, marks)
  if legend:
    axes.legend(
      loc='lower left',
      bbox_to_anchor=(0, 1.01),
      ncols=len(lines),
      frameon=False,
      borderaxespad=0,
      handlelength=3,
    )
  return _inline(figure, title)


def _log_ticks(axes: Axes) -> None:
  """Makes the y axis logarithmic, with plain numbers as ticks."""
  axes.set_yscale('log')
  low, high = axes.get_ylim()
  steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
  axes.yaxis.set_major_locator(LogLocator(subs=steps))
  axes.yaxis.set_minor_locator(NullLocator())
  # The default writes powers of ten as math, which is off here.
  axes.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))


def _mark(axes: Axes, marks: Sequence[tuple[float, str]]) -> None:
  """Draws vertical lines inside the data's range, with names above them."""
  low, high = axes.dataLim.intervalx
  row, room = 0, -1.0  # where the previous name ends, points
  for x, name in marks:
    if not low < x < high:
      continue
    axes.axvline(x, color=_GREY, linewidth=0.8, linestyle=(0, (3, 3)))
    at, _ = axes.transData.transform((x, 0)) * 72 / axes.figure.dpi
    row = (row + 1) % 2 if at < room else 0
    room = at + 5 * len(name)
    axes.annotate(
      name,
      (x, 1),
      (-2, 2 + 8 * row),
      xycoords=('data', 'axes fraction'),
      textcoords='offset points',
      color=_GREY,
      size=7,
    )


@_styled
def scatter(
  title: str,
  points: np.ndarray,
  groups: np.ndarray,
  low: np.ndarray,
  high: np.ndarray,
) -> str:
  """Draws points by their first two principal components.

  Args:
    title: text above the chart, unlike that of any other figure of the page.
    points: [N, 2].
    groups: class of each point, int [N], below `len(CLASSES)`.
    low: smallest values of both axes, [2].
    high: largest values of both axes, [2].
  """
  figure, axes = _figure(title, (_QUARTER, _QUARTER + 22), (18, 2, 22, 18))
  margin = 0.03 * (high - low) + 1e-9
  axes.set(
    xlim=(low[0] - margin[0], high[0] + margin[0]),
    ylim=(low[1] - margin[1], high[1] + margin[1]),
    xticks=[],
    yticks=[],
  )
  axes.spines[:].set(visible=True, color='#bbbbbb')
  axes.set_xlabel('first principal component', size=7, labelpad=3)
  axes.set_ylabel('second principal component', size=7, labelpad=3)
  for group in np.unique(groups):
    x, y = points[groups == group].T
    axes.plot(
      x,
      y,
      'o',
      color=CLASSES[group],
      markersize=3,
      markeredgewidth=0,
      alpha=0.7,
    )
  for group in np.unique(groups):
    x, y = np.median(points[groups == group], 0)
    axes.text(
      x,
      y,
      str(group),
      ha='center',
      va='center',
      weight='bold',
      bbox={
        'boxstyle': 'circle,pad=0.2',
        'facecolor': 'white',
        'edgecolor': CLASSES[group],
        'linewidth': 1.5,
        'alpha': 0.85,
      },
    )
  return _inline(figure, title)


@_styled
def heat_map(
  title: str, values: np.ndarray, largest: float, names: np.ndarray
) -> str:
  """Draws a small symmetric matrix whose diagonal is zero.

  Args:
    title: text above the chart, unlike that of any other figure of the page.
    values: [K, K], not negative.
    largest: the value of the darkest colour.
    names: class numbers of rows and columns, int [K].
  """
  figure, axes = _figure(title, (THIRD, THIRD + 14), (36, 4, 22, 32))
  size = len(values)
  shown = np.where(np.eye(size, dtype=bool), np.nan, values)
  axes.pcolormesh(
    shown, cmap='Blues', vmin=0, vmax=largest, edgecolor='white', linewidth=0.5
  )
  axes.set_facecolor('#f0f0f0')
  axes.grid(False)
  axes.spines[:].set_visible(False)
  places = np.arange(size) + 0.5
  axes.set_xticks(places, [str(name) for name in names])
  axes.set_yticks(places, [str(name) for name in names])
  axes.tick_params(length=0, labelsize=7.5)
  axes.invert_yaxis()
  axes.set_xlabel('class', size=7.5, labelpad=1)
  axes.set_ylabel('class', size=7.5, labelpad=2)
  for row, column in np.argwhere(np.isfinite(shown)):
    value = values[row, column]
    axes.text(
      column + 0.5,
      row + 0.5,
      f'{value:.1f}' if value < 9.95 else f'{value:.0f}',
      ha='center',
      va='center',
      size=7,
      color='white' if value > 0.66 * largest else _INK,
    )
  return _inline(figure, title)
