"""Figures as SVG text: lines, points, bars. No styles of their own: colours and type come from the page's style sheet,
so that they follow its light and dark. Each is drawn in units of about one pixel at the width of a column.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bylaw.words import number, visible

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 28, 40


@dataclass(frozen=True)
class Series:
    """A named line; its place in the list gives its colour."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Point:
    """A dot with words beside it; `size` is its radius."""

    x: float
    y: float
    label: str = ""
    size: float = 4.0
    tone: int = 0


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, in data units."""

    label: str
    low: float
    high: float
    share: bool = False
    whole: bool = False
    """Whether it counts, such as steps."""

    @property
    def ticks(self) -> list[float]:
        """Three to seven round numbers within the axis; fewer where it counts only so far."""
        step = max(round_up((self.high - self.low) / 6), float(self.whole))
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def text(self, value: float) -> str:
        """A tick's label."""
        if self.share:
            return f"{round(100 * value, 6):g} %".replace("-", "−")
        return number(round(value, 10))


def axis(label: str, values: Sequence[float], share: bool = False, zero: bool = False) -> Axis:
    """An axis that holds all values, with a little room; `share` from 0 to 1, `zero` at least down to 0."""
    if share:
        return Axis(label, 0.0, 1.0, True)
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    room = 0.06 * (high - low) or max(abs(high) * 0.1, 0.5)
    return Axis(label, low if zero and low == 0 else low - room, high + room)


def line_chart(title: str, lines: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """Lines over a common x, such as steps."""
    drawn = [
        Markup('<polyline class="line tone{}" points="{}"/>').format(tone, _path(line.xs, line.ys, x, y))
        for tone, line in enumerate(lines)
    ]
    return _figure(title, x, y, drawn)


def scatter(
    title: str, points: Sequence[Point], x: Axis, y: Axis, join: bool = False, diagonal: bool = False
) -> Markup:
    """Dots, joined in their order by a thin line if asked; `diagonal` draws y = x."""
    drawn: list[Markup] = []
    if diagonal:
        ends = _path((x.low, x.high), (x.low, x.high), x, y)
        drawn.append(Markup('<polyline class="guide" points="{}"/>').format(ends))
    if join:
        path = _path([p.x for p in points], [p.y for p in points], x, y)
        drawn.append(Markup('<polyline class="thread" points="{}"/>').format(path))
    return _figure(title, x, y, drawn + [_dot(point, x, y) for point in points])


def bars(title: str, edges: Sequence[float], counts: Sequence[float], x: Axis, y_label: str) -> Markup:
    """A histogram: bar i stands from edges[i] to edges[i + 1]."""
    y = axis(y_label, list(counts) or [1.0], zero=True)
    drawn = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        left, right, top = _across(low, x), _across(high, x), _up(count, y)
        box = Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>')
        name = Markup("<title>{} to {}: {}</title>").format(x.text(low), x.text(high), number(count))
        drawn.append(box.format(left + 0.5, top, max(right - left - 1, 0.5), max(HEIGHT - BOTTOM - top, 0), name))
    return _figure(title, x, y, drawn)


def histogram(values: Sequence[float], low: float, high: float, bins: int) -> tuple[list[float], list[int]]:
    """Edges and counts of equal bins; what lies outside counts in the outermost."""
    counts = [0] * bins
    for value in values:
        place = int((value - low) / (high - low) * bins)
        counts[min(max(place, 0), bins - 1)] += 1
    return [low + (high - low) * n / bins for n in range(bins + 1)], counts


def round_up(rough: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten, not below `rough`, which is above 0."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _figure(title: str, x: Axis, y: Axis, drawn: Sequence[Markup]) -> Markup:
    parts = [*_grid(x, y), *drawn]
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, visible(title), Markup("\n").join(parts)
    )


def _grid(x: Axis, y: Axis) -> list[Markup]:
    floor, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y.ticks:
        at = _up(value, y)
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, end, at, at)
        parts += [line, _text(y.text(value), LEFT - 6, at + 4, "end")]
    parts += [_text(x.text(value), _across(value, x), floor + 16, "middle") for value in x.ticks]
    parts.append(Markup('<line class="floor" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, end, floor, floor))
    parts.append(_text(x.label, (LEFT + end) / 2, HEIGHT - 6, "middle", "name"))
    return [*parts, _text(y.label, 0, 12, "start", "name")]  # above the axis, where it reads without turning one's head


def _dot(point: Point, x: Axis, y: Axis) -> Markup:
    across, up = _across(point.x, x), _up(point.y, y)
    called = f"{visible(point.label)}: " if point.label else ""
    name = Markup("<title>{}{}, {}</title>").format(called, x.text(point.x), y.text(point.y))
    dot = Markup('<circle class="dot tone{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">{}</circle>')
    drawn = dot.format(point.tone, across, up, point.size, name)
    if not point.label:
        return drawn
    right = across < WIDTH * 0.7
    beside = across + (8 if right else -8)
    return drawn + _text(point.label, beside, up - 7 if up > TOP + 12 else up + 16, "start" if right else "end", "word")


def _text(text: str, x: float, y: float, anchor: str, kind: str = "tick") -> Markup:
    shape = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return shape.format(kind, x, y, anchor, visible(text))


def _path(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis) -> str:
    return " ".join(f"{_across(a, x):.1f},{_up(b, y):.1f}" for a, b in zip(xs, ys, strict=True))


def _across(value: float, x: Axis) -> float:
    return LEFT + (value - x.low) / (x.high - x.low or 1) * (WIDTH - LEFT - RIGHT)


def _up(value: float, y: Axis) -> float:
    return HEIGHT - BOTTOM - (value - y.low) / (y.high - y.low or 1) * (HEIGHT - TOP - BOTTOM)
