"""Charts as HTML for ``core.page``: bars, a histogram, lines, dots.

What: functions from numbers to HTML. How: bars are a grid of boxes, so that text stays text at any
width; the others are inline SVG whose colours are the page's. Constraint: light, dark and print
come from the style sheet alone, and every chart carries its numbers as text for those who do not
see it. Trade-off: a few kinds of chart by hand instead of matplotlib, whose SVG has its colours and
sizes drawn in (unreadable in the dark and at 400 pixels) and takes 0.6 s to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from finegraft.core.page import TONES, escape

_WIDTH, _HEIGHT = 460, 218  # of the drawing; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 38
_LETTER, _LONGEST_TICK = 8, 16  # width and number of letters of a tick's text
_POINTS = 600  # of one line; more are thinned to the least and greatest of each step


def bars(
    title: str,
    values: Mapping[str, float],
    *,
    tones: Mapping[str, str] | None = None,
    unit: str = "",
) -> str:
    """Horizontal bars with their names and values.

    Args:
        title: Plain text.
        values: Name to value, 0 or more, in the order shown.
        tones: Colour of a bar, one of ``page.TONES``, by name.
        unit: Written after each value.
    """
    most = max(values.values(), default=0) or 1
    cells = []
    for name, value in values.items():
        tone = (tones or {}).get(name, "")
        colour = f";--fill:var(--{tone})" if tone in TONES else ""
        cells.append(
            f'<div class="name">{escape(name)}</div><div class="track">'
            f'<div class="fill" style="width:{_percent(value, most)}%{colour}"></div></div>'
            f'<div class="value">{_number(value)}{escape(unit)}</div>'
        )
    return _figure(title, f'<div class="bars">{"".join(cells)}</div>')


def histogram(
    title: str,
    values: Sequence[float],
    *,
    bins: int = 40,
    unit: str = "",
    mark: tuple[float, str] | None = None,
) -> str:
    """How often values of each size occur; the last bar holds all above the 99.5th percentile.

    Args:
        title: Plain text.
        values: At least one.
        bins: Bars.
        unit: Of the values, written on the axis.
        mark: A value with a dashed line, and its name.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.995 * len(ordered)))]
    step = _nice((high - low) / bins or 1)
    low = math.floor(low / step) * step
    count = max(1, math.floor((high - low) / step) + 1)
    found = [0] * count
    for value in ordered:
        found[min(count - 1, int((value - low) // step))] += 1
    top = max(found)
    plot_w, plot_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    wide = plot_w / count
    parts = [_axis_y(0, top)]
    for i, n in enumerate(found):
        if n:
            tall = max(1.0, plot_h * n / top)
            more = " or more" if i == count - 1 and ordered[-1] > low + count * step else ""
            said = f"{_number(low + i * step)} to {_number(low + (i + 1) * step)}{more}: {n:,}"
            parts.append(
                f'<rect class="bar" x="{_LEFT + i * wide:.1f}" y="{_TOP + plot_h - tall:.1f}" '
                f'width="{max(wide - 1, 0.5):.1f}" height="{tall:.1f}"><title>{said}</title></rect>'
            )
    end = low + count * step
    parts.append(_axis_x(low, end, unit))
    if mark and low <= mark[0] <= end:
        x = _LEFT + plot_w * (mark[0] - low) / (end - low)
        side = "end" if x > _WIDTH / 2 else "start"
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + plot_h}"/>'
            f'<text class="marked" x="{x + (-5 if side == "end" else 5):.1f}" y="{_TOP + 10}" '
            f'text-anchor="{side}">{escape(mark[1])}</text>'
        )
    middle = ordered[len(ordered) // 2]
    told = (
        f"{len(ordered):,} values: least {_number(ordered[0])}, middle {_number(middle)}, "
        f"greatest {_number(ordered[-1])} {unit}".rstrip()
    )
    return _figure(title, _svg(parts, f"{title}. {told}"), told)


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_name: str = "",
    logarithmic: bool = False,
) -> str:
    """Up to four lines over one axis.

    Args:
        title: Plain text.
        series: Points (x, y) of each line by its name; y that are not finite are left out.
        x_name: Of the axis below.
        logarithmic: Scale of y; values of 0 and below are left out.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic)]
        for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return _figure(title, '<p class="soft">no values</p>')
    scale = math.log10 if logarithmic else float
    xs = [x for points in kept.values() for x, _ in points]
    ys = [scale(y) for points in kept.values() for _, y in points]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    x1 += x0 == x1
    if y0 == y1:
        y0, y1 = y0 - 0.5, y1 + 0.5
    plot_w, plot_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    parts = [_axis_y(y0, y1, logarithmic), _axis_x(x0, x1, x_name)]
    legend = []
    for place, (name, points) in enumerate(kept.items()):
        spots = [
            (_LEFT + plot_w * (x - x0) / (x1 - x0), _TOP + plot_h * (y1 - scale(y)) / (y1 - y0))
            for x, y in _thinned(points)
        ]
        tone = f"s{place % 4}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        if len(spots) == 1:
            x, y = spots[0]
            parts.append(f'<circle class="{tone}" fill="currentColor" cx="{x}" cy="{y}" r="4"/>')
        parts.append(f'<polyline class="line {tone}" points="{path}"/>')
        first, last = points[0][1], points[-1][1]
        legend.append(
            f'<span><b class="{tone}">{escape(name)}</b> {_number(first)} to {_number(last)}</span>'
        )
    told = "; ".join(
        f"{name} from {_number(p[0][1])} to {_number(p[-1][1])}" for name, p in kept.items()
    )
    drawing = _svg(parts, f"{title}: {told}")
    return _figure(title, f'{drawing}<div class="legend">{"".join(legend)}</div>')


def dots(
    title: str,
    points: Sequence[tuple[float | str, float, str]],
    *,
    x_name: str = "",
    logarithmic_x: bool = False,
    logarithmic_y: bool = False,
) -> str:
    """One dot a point; a line leads through the lowest at each place, the lowest of all has a ring.

    Args:
        title: Plain text.
        points: x, y and what is said of it; x are numbers, or names that stand in their order.
        x_name: Of the axis below.
        logarithmic_x: Scale of x, all above 0.
        logarithmic_y: Scale of y, all above 0.
    """
    kept = [point for point in points if math.isfinite(point[1])]
    if not kept:
        return _figure(title, '<p class="soft">no values</p>')
    places = list(dict.fromkeys(x for x, _, _ in kept))
    numbers = [x for x in places if not isinstance(x, str)]
    named = len(numbers) < len(places)
    if named:
        at = {x: float(i) for i, x in enumerate(places)}
    else:
        at = {x: math.log10(x) if logarithmic_x else float(x) for x in numbers}
    scale = math.log10 if logarithmic_y else float
    ys = [scale(y) for _, y, _ in kept]
    (x0, x1), (y0, y1) = _with_room(at.values(), 0.06), _with_room(ys, 0.08)
    plot_w, plot_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def spot(x: float | str, y: float) -> tuple[float, float]:
        return (
            _LEFT + plot_w * (at[x] - x0) / (x1 - x0),
            _TOP + plot_h * (y1 - scale(y)) / (y1 - y0),
        )

    best = min(kept, key=lambda point: point[1])
    lowest = {x: min(y for other, y, _ in kept if other == x) for x in places}
    ordered = places if named else sorted(places, key=lambda x: at[x])
    path = " ".join("{:.1f},{:.1f}".format(*spot(x, lowest[x])) for x in ordered)
    parts = [
        _axis_y(y0, y1, logarithmic_y),
        _axis_of(ordered, lambda x: spot(x, best[1])[0], x_name),
    ]
    parts.append(f'<polyline class="line s3" points="{path}"/>')
    for x, y, words in kept:
        across, down = spot(x, y)
        parts.append(
            f'<circle class="s0" fill="currentColor" fill-opacity="0.6" cx="{across:.1f}" '
            f'cy="{down:.1f}" r="4.5"><title>{escape(words)}</title></circle>'
        )
    across, down = spot(best[0], best[1])
    parts.append(
        f'<circle class="s1" fill="none" stroke-width="2.5" cx="{across:.1f}" cy="{down:.1f}" '
        'r="8"/>'
    )
    told = f"ring: the lowest, {best[2]}"
    return _figure(title, _svg(parts, f"{title}; {len(kept)} values; {told}"), told)


def _with_room(values: Iterable[float], share: float) -> tuple[float, float]:
    """The ends of an axis, so that no dot lies on its edge."""
    values = list(values)
    low, high = min(values), max(values)
    room = (high - low) * share or 0.5
    return low - room, high + room


def _axis_of(
    places: Sequence[float | str], across: Callable[[float | str], float], name: str
) -> str:
    """An axis whose ticks are the places themselves; of many, those with room for their text."""
    y = _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>']
    end = -math.inf
    for place in places:
        text = place if isinstance(place, str) else _number(place)
        text = text if len(text) <= _LONGEST_TICK else text[: _LONGEST_TICK - 1] + "…"
        half = _LETTER * len(text) / 2
        x = min(max(across(place), half), _WIDTH - half)
        if x - half < end:
            continue
        end = x + half + _LETTER
        parts.append(f'<text x="{x:.1f}" y="{y + 17}" text-anchor="middle">{escape(text)}</text>')
    if name:
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{y + 33}" text-anchor="end">{escape(name)}</text>'
        )
    return "".join(parts)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The least and greatest of every step, so that a peak is never lost."""
    if len(points) <= _POINTS:
        return list(points)
    step = math.ceil(2 * len(points) / _POINTS)
    out: list[tuple[float, float]] = []
    for i in range(0, len(points), step):
        part = points[i : i + step]
        ends = {part.index(min(part, key=_second)), part.index(max(part, key=_second))}
        out += [part[i] for i in sorted(ends)]
    return out


def _percent(value: float, most: float) -> str:
    """Share of the longest bar; what is above 0 is seen."""
    return f"{max(100 * value / most, 0.5):.2f}" if value > 0 else "0"


def _second(point: tuple[float, float]) -> float:
    return point[1]


def _figure(title: str, body: str, note: str = "") -> str:
    small = f'<div class="legend soft">{escape(note)}</div>' if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}{small}</figure>"


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _nice(step: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def _ticks(low: float, high: float, count: int) -> list[float]:
    step = _nice((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _axis_x(low: float, high: float, name: str) -> str:
    plot_w, y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>']
    for tick in _ticks(low, high, 5):
        x = _LEFT + plot_w * (tick - low) / (high - low)
        parts.append(f'<text x="{x:.1f}" y="{y + 17}" text-anchor="middle">{_number(tick)}</text>')
    if name:
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{y + 33}" text-anchor="end">{escape(name)}</text>'
        )
    return "".join(parts)


def _axis_y(low: float, high: float, logarithmic: bool = False) -> str:
    plot_h = _HEIGHT - _TOP - _BOTTOM
    parts = []
    for tick in _ticks(low, high, 4) if high > low else []:
        y = _TOP + plot_h * (high - tick) / (high - low)
        value = _number(10**tick if logarithmic else tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value}</text>'
        )
    return "".join(parts)


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
