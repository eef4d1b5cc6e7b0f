"""Charts as inline SVG, 360 units wide, so that their text is legible on a phone and on a desk.

What each has: a title, both axes named with their units, a legend that says which line is which by
colour, dash and marker, and at the end of a line its last value. Nothing hides anything:

- labels at the ends of lines are moved apart, with a thread to where they belong;
- lines that run on each other are drawn from wide to thin, and dashed over solid, so that every one
  shows (`_widths`);
- more points than there is room for become the band from least to most of each column and the
  column's mean (`thinned`), which the chart says;
- values that are not finite break the line and are marked on the axis below it; a few far outliers
  leave the frame and are marked at its edge, with their number and the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .chart_parts import MARKERS, WIDTH, fitted, heading, marker, short, spread_out, svg, wide
from .html_page import text
from .numbers_text import number, powers_between, steps_between, tick_texts

LEFT, RIGHT, BOTTOM = 48, 62, 34
PLOT_WIDTH = WIDTH - LEFT - RIGHT
PLOT_HEIGHT = 150
ROW = 15  # of the legend
COLUMNS = PLOT_WIDTH  # a point or a band for each unit of width
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 4", "6 2 1 2 1 2")
NUM_COLOURS = 8

Point = tuple[float, float]
End = tuple[Point, str, int | None]  # what is written right of the frame, and its style


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order of x. `style` gives colour, dash and marker."""

    label: str
    points: Sequence[Point]
    style: int = 0
    dash: int | None = None  # of DASHES; None: by style
    mark_all: bool = False  # a marker at every point: few points, each of its own
    line: bool = True
    spread: Sequence[tuple[float, float]] = ()  # (low, high) of each point: an interval
    sizes: Sequence[float] = ()  # radius of each point's marker


@dataclass(frozen=True)
class Chart:
    """A chart of lines."""

    title: str
    x: str  # name and unit of an axis
    y: str
    series: Sequence[Series]
    whole_x: bool = False  # steps, rounds: ticks at whole numbers
    whole_y: bool = False  # counts
    log_x: float | None = None  # base
    log_y: bool = False
    limits: tuple[float, float] | None = None  # of y
    limits_x: tuple[float, float] | None = None
    given: Sequence[tuple[float, str]] = ()  # horizontal lines that are no data: (y, label)
    diagonal: str = ""  # label of y = x
    ticks_x: Sequence[float] = ()
    ends: bool = True  # last values at the ends
    note: str = ""


@dataclass
class _Drawing:
    """A series as it is drawn."""

    series: Series
    parts: list[list[Point]]  # runs of finite points, in data
    bands: list[list[tuple[float, float, float]]]  # (x, least, most)
    broken: list[float]  # x of what is not finite
    width: float = 1.8
    pixels: list[list[Point]] = field(default_factory=list)


def line_chart(chart: Chart) -> str:
    """The chart as `<svg>`; empty where no series has a point."""
    drawn = [_prepared(s) for s in chart.series if len(s.points)]
    if not any(d.parts or d.broken for d in drawn):
        return ""
    xs = [p[0] for d in drawn for p in d.series.points if math.isfinite(p[0])]
    seen = [
        y
        for d in drawn
        for y in (
            *(p[1] for part in d.parts for p in part),
            *(v for band in d.bands for _, *both in band for v in both),
            *(v for low_high in d.series.spread for v in low_high),
        )
        if math.isfinite(y) and (not chart.log_y or y > 0)
    ]
    x_low, x_high = chart.limits_x or (min(xs, default=0.0), max(xs, default=0.0))
    x_scale = _scale(x_low, x_high, chart.log_x, chart.whole_x)
    (low, high), clipped = _range(seen, chart)
    y_scale = _Scale(low, high, 10.0 if chart.log_y else None)
    legend, legend_height = _legend(chart)
    top = 20 + legend_height + 20
    bottom = top + PLOT_HEIGHT

    def place(x: float, y: float) -> Point:
        return (
            LEFT + PLOT_WIDTH * x_scale.at(x),
            bottom - PLOT_HEIGHT * min(max(y_scale.at(y), 0.0), 1.0),
        )

    for d in drawn:
        d.pixels = [[place(*p) for p in part] for part in d.parts]
    for d, width in zip(drawn, _widths([d.pixels for d in drawn]), strict=True):
        d.width = width
    out = [heading(chart.title)]
    out += legend
    out.append(f'<text class="soft" x="0" y="{top - 10}">{text(fitted(chart.y, WIDTH))}</text>')
    out += _axes(chart, x_scale, y_scale, top)
    ends: list[End] = []
    for value, label in chart.given:
        y = place(x_scale.low, value)[1]
        out.append(_given(LEFT, y, WIDTH - RIGHT, y))
        ends.append(((float(WIDTH - RIGHT), y), fitted(label, RIGHT - 9), None))
    if chart.diagonal:
        a, b = max(x_scale.low, low), min(x_scale.high, high)
        (x0, y0), (x1, y1) = place(a, a), place(b, b)
        out.append(_given(x0, y0, x1, y1))
    for d in drawn:
        out.append(_series(d, place, bottom, low, high, chart))
    out += _end_labels([*ends, *(_ends(drawn) if chart.ends else [])], top, bottom)
    notes = _notes(drawn, clipped, chart)
    y = bottom + BOTTOM + 8
    for line in notes:
        out.append(f'<text class="soft" x="0" y="{y}">{text(line)}</text>')
        y += 14
    height = bottom + BOTTOM + 4 + 14 * len(notes)
    return svg(height, chart.title, out)


# --- scales ---


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    base: float | None = None

    def at(self, value: float) -> float:
        """Where in [0, 1] a value stands."""
        if self.base is None:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return 0.0
        return math.log(value / self.low) / math.log(self.high / self.low)


def _scale(low: float, high: float, base: float | None, whole: bool) -> _Scale:
    if low < high:
        return _Scale(low, high, base)
    if base:
        return _Scale(low / base, high * base, base)
    if whole or low == 0:
        return _Scale(low - 1, high + 1)
    return _Scale(low - abs(low) * 0.1, high + abs(low) * 0.1)


def _range(seen: list[float], chart: Chart) -> tuple[tuple[float, float], list[float]]:
    """(low and high of the y axis, the values that it leaves out)."""
    if chart.limits:
        return chart.limits, []
    seen = seen + [value for value, _ in chart.given]
    if not seen:
        return (0.0, 1.0), []
    low, high = min(seen), max(seen)
    clipped: list[float] = []
    if not chart.log_y and len(seen) >= 40:
        ordered = sorted(seen)
        a, b = ordered[len(ordered) // 50], ordered[-1 - len(ordered) // 50]
        room = 4 * (b - a)
        if room > 0 and (high > b + room or low < a - room):
            clipped = [y for y in seen if y > b + room or y < a - room]
            kept = [y for y in seen if a - room <= y <= b + room]
            low, high = min(kept), max(kept)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        if chart.log_y:
            return (low / 2, high * 2), clipped
        return (low - room, high + room), clipped
    if chart.log_y:
        return (low / 1.15, high * 1.15), clipped
    room = 0.05 * (high - low)
    return (low - room, high + room), clipped


# --- series ---


def _prepared(s: Series) -> _Drawing:
    parts: list[list[Point]] = [[]]
    broken = []
    for x, y in s.points:
        if math.isfinite(y):
            parts[-1].append((x, y))
        else:
            broken.append(x)
            if parts[-1]:
                parts.append([])
    parts = [p for p in parts if p]
    bands: list[list[tuple[float, float, float]]] = []
    if sum(map(len, parts)) > 2 * COLUMNS:
        parts, bands = thinned(parts)
    return _Drawing(s, parts, bands, broken)


def thinned(
    parts: Sequence[Sequence[Point]], columns: int = COLUMNS
) -> tuple[list[list[Point]], list[list[tuple[float, float, float]]]]:
    """(the mean of each column, the least and most of it); no value is lost from the band."""
    low = min(p[0][0] for p in parts)
    high = max(p[-1][0] for p in parts)
    width = (high - low) / columns or 1.0
    lines, bands = [], []
    for part in parts:
        line: list[Point] = []
        band: list[tuple[float, float, float]] = []
        column: list[float] = []
        at = None
        for x, y in [*part, (math.inf, 0.0)]:
            here = None if math.isinf(x) else min(int((x - low) / width), columns - 1)
            if here != at and column:
                assert at is not None
                middle = low + (at + 0.5) * width
                line.append((middle, sum(column) / len(column)))
                band.append((middle, min(column), max(column)))
                column = []
            at = here
            column.append(y)
        lines.append(line)
        bands.append(band)
    return lines, bands


def _widths(lines: Sequence[list[list[Point]]]) -> list[float]:
    """Widths of lines in drawing order: each that runs below a later one is wider than it."""
    n = len(lines)
    widths = [1.8] * n
    at: list[dict[int, float]] = []
    for parts in lines:
        found: dict[int, float] = {}
        for part in parts:
            found.update({round(x): y for x, y in part[:1]})
            for (x0, y0), (x1, y1) in pairwise(part):
                for column in range(math.ceil(x0), math.floor(x1) + 1):
                    share = (column - x0) / (x1 - x0) if x1 > x0 else 0.0
                    found[column] = y0 + share * (y1 - y0)
        at.append(found)
    for i in range(n - 2, -1, -1):
        above = [widths[j] for j in range(i + 1, n) if _run_on(at[i], at[j])]
        if above:
            widths[i] = max(above) + 1.3
    return widths


def _run_on(a: dict[int, float], b: dict[int, float]) -> bool:
    both = a.keys() & b.keys()
    near = sum(abs(a[x] - b[x]) < 2.0 for x in both)
    return bool(both) and near > 0.1 * len(both)


def _series(
    d: _Drawing,
    place: Callable[[float, float], Point],
    bottom: float,
    low: float,
    high: float,
    chart: Chart,
) -> str:
    s = d.series
    out = [f'<g class="c{s.style % NUM_COLOURS}"><title>{text(s.label)}</title>']
    for band in d.bands:
        upper = [place(x, most) for x, _, most in band]
        lower = [place(x, least) for x, least, _ in reversed(band)]
        out.append(f'<path d="{_path([*upper, *lower])}Z" fill="currentColor" opacity=".25"/>')
    dash = DASHES[(s.style if s.dash is None else s.dash) % len(DASHES)]
    if s.line:
        for part in d.pixels:
            if len(part) > 1:
                marks = f' stroke-dasharray="{dash}"' if dash else ""
                out.append(
                    f'<path d="{_path(part)}" fill="none" stroke="currentColor" '
                    f'stroke-width="{d.width:.1f}" stroke-linejoin="round"{marks}/>'
                )
    for point, (below, above) in zip(s.points, s.spread, strict=False):
        if not all(map(math.isfinite, (point[1], below, above))):
            continue
        x, y0 = place(point[0], below)
        y1 = place(point[0], above)[1]
        x += 3.0 * (s.style % 3 - 1)  # intervals of one x stand beside each other
        out.append(
            f'<path d="M{x:.1f} {y0:.1f}V{y1:.1f}M{x - 3:.1f} {y0:.1f}h6M{x - 3:.1f} {y1:.1f}h6" '
            f'stroke="currentColor" stroke-width="1.2" fill="none"><title>'
            f"{text(f'{s.label}: {number(point[1])} ({number(below)} to {number(above)})')}"
            f"</title></path>"
        )
    out += _markers(d)
    for x in d.broken:
        at = place(x, low)[0]
        out.append(
            f'<path class="broken" d="M{at - 3:.1f} {bottom - 3:.1f}l6 6m0 -6l-6 6" '
            'stroke="currentColor" stroke-width="1.6"/>'
        )
    if not chart.limits:
        for part in d.parts if not d.bands else []:
            for x, y in part:
                if y > high or y < low:
                    px, py = place(x, y)
                    turn = -5 if y > high else 5
                    out.append(
                        f'<path class="outside" d="M{px - 3:.1f} {py:.1f}h6l-3 {turn}Z" '
                        'fill="currentColor"/>'
                    )
    return "".join([*out, "</g>"])


def _markers(d: _Drawing) -> list[str]:
    """Markers at every point where there are few, else at some, no two series' at the same x."""
    points = [p for part in d.pixels for p in part]
    s = d.series
    if not points or (d.bands and not s.mark_all):
        return []
    every = s.mark_all or not s.line or len(points) <= 12
    if every and len(points) <= 200:
        chosen = list(range(len(points)))
    else:
        apart = max(1, len(points) // 5)
        chosen = list(
            range(min((apart * (1 + 2 * (s.style % 5))) // 10, len(points) - 1), len(points), apart)
        )
    shape = MARKERS[s.style % len(MARKERS)]
    out = []
    for i in chosen:
        size = (
            s.sizes[i] if i < len(s.sizes) and len(s.sizes) == len(points) else 1.2 + 0.9 * d.width
        )
        out.append(marker(shape, *points[i], size))
    return out


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


# --- what is written on a chart ---


def _legend(chart: Chart) -> tuple[list[str], float]:
    """(elements, height) of the legend, whose entries stand in as many rows as they need."""
    shown = [s for s in chart.series if len(s.points)]
    entries = [(s, s.label) for s in shown if s.label]
    if len(entries) == 1 and not chart.diagonal and entries[0][1] in ("", chart.title):
        return [], 0
    out, x, row = [], 0.0, 0
    names: list[tuple[Series | None, str]] = [*entries]
    if chart.diagonal:
        names.append((None, chart.diagonal))
    for s, label in names:
        label = fitted(label, WIDTH - 30)
        width = 28 + wide(label) + 12
        if x and x + width > WIDTH + 12:
            x, row = 0.0, row + 1
        y = 27 + ROW * row
        if s is None:
            out.append(_given(x, y - 4, x + 22, y - 4))
        else:
            out.append(f'<g class="c{s.style % NUM_COLOURS}">')
            if s.line:
                dash = DASHES[(s.style if s.dash is None else s.dash) % len(DASHES)]
                marks = f' stroke-dasharray="{dash}"' if dash else ""
                out.append(
                    f'<path d="M{x:.1f} {y - 4}h22" stroke="currentColor" stroke-width="2"{marks}/>'
                )
            out.append(marker(MARKERS[s.style % len(MARKERS)], x + 11, y - 4) + "</g>")
        out.append(f'<text class="name" x="{x + 26:.1f}" y="{y}">{text(label)}</text>')
        x += width
    return out, ROW * (row + 1) if names else 0


def _given(x0: float, y0: float, x1: float, y1: float) -> str:
    return (
        f'<path class="given" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke-width="1.2" '
        'stroke-dasharray="1 3" fill="none"/>'
    )


def _axes(chart: Chart, x_scale: _Scale, y_scale: _Scale, top: float) -> list[str]:
    bottom, out = top + PLOT_HEIGHT, []
    if y_scale.base:
        y_ticks = powers_between(y_scale.low, y_scale.high, 10, 7)
    else:
        y_ticks = steps_between(y_scale.low, y_scale.high, 6, chart.whole_y)
    labels = tick_texts(y_ticks)
    if any(wide(label) > LEFT - 6 for label in labels):
        labels = [short(tick, LEFT - 6) for tick in y_ticks]
    for tick, label in zip(y_ticks, labels, strict=True):
        y = bottom - PLOT_HEIGHT * y_scale.at(tick)
        out.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(
            f'<text class="tick soft" text-anchor="end" x="{LEFT - 4}" y="{y + 3.5:.1f}">'
            f"{text(label)}</text>"
        )
    out.append(f'<path class="axis" d="M{LEFT} {top}V{bottom}H{WIDTH - RIGHT}" fill="none"/>')
    for tick, label in _x_ticks(chart, x_scale):
        x = LEFT + PLOT_WIDTH * x_scale.at(tick)
        out.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        out.append(
            f'<text class="tick soft" text-anchor="middle" x="{x:.1f}" y="{bottom + 15}">'
            f"{text(label)}</text>"
        )
    out.append(
        f'<text class="soft" text-anchor="middle" x="{LEFT + PLOT_WIDTH / 2}" y="{bottom + 30}">'
        f"{text(fitted(chart.x, PLOT_WIDTH + LEFT))}</text>"
    )
    return out


def _x_ticks(chart: Chart, scale: _Scale) -> list[tuple[float, str]]:
    """As many ticks as have room for their labels."""
    for most in (7, 6, 5, 4, 3, 2, 1):
        if chart.ticks_x:
            every = -(-len(chart.ticks_x) // most)
            ticks = list(chart.ticks_x)[::every]
        elif scale.base:
            ticks = powers_between(scale.low, scale.high, scale.base, most)
        else:
            ticks = steps_between(scale.low, scale.high, most, chart.whole_x)
        labels = tick_texts(ticks)
        at = [PLOT_WIDTH * scale.at(t) for t in ticks]
        reach = [wide(label) / 2 + 4 for label in labels]
        if all(
            b - a >= r + q for (a, b), (r, q) in zip(pairwise(at), pairwise(reach), strict=True)
        ):
            break
    return [(t, label) for t, label in zip(ticks, labels, strict=True) if 0 <= scale.at(t) <= 1]


def _ends(drawn: Sequence[_Drawing]) -> list[End]:
    """The last value of each line."""
    found: list[End] = []
    for d in drawn:
        last = next((p for p in reversed(list(d.series.points)) if math.isfinite(p[1])), None)
        if last is not None and d.pixels and d.series.line:
            found.append((d.pixels[-1][-1], short(last[1], RIGHT - 9), d.series.style))
    return found


def _end_labels(ends: Sequence[End], top: float, bottom: float) -> list[str]:
    """Labels right of the frame, none over another, with a thread where they had to move."""
    ends = sorted(ends, key=lambda end: end[0][1])
    apart = 11.5
    if not ends or len(ends) > PLOT_HEIGHT / apart:
        return []  # too many to read: the table has the numbers
    out = []
    places = spread_out([at[1] for at, _, _ in ends], apart, top + 3, bottom - 1)
    for (at, label, style), y in zip(ends, places, strict=True):
        x = WIDTH - RIGHT + 9
        if math.hypot(x - 2 - at[0], y - at[1]) > 9:
            out.append(
                f'<path class="given" d="M{at[0] + 2:.1f} {at[1]:.1f}L{x - 2} {y:.1f}" '
                'stroke-width=".7" opacity=".7" fill="none"/>'
            )
        where = f'x="{x}" y="{y + 3.5:.1f}">{text(label)}</text>'
        if style is None:
            out.append(f'<text class="soft end" {where}')
        else:
            out.append(f'<g class="c{style % NUM_COLOURS}"><text class="own end" {where}</g>')
    return out


def _notes(drawn: Sequence[_Drawing], clipped: Sequence[float], chart: Chart) -> list[str]:
    notes = [chart.note] if chart.note else []
    if any(d.bands for d in drawn):
        notes.append("line: mean of a column; band: its least to most")
    broken = sum(len(d.broken) for d in drawn)
    if broken:
        notes.append(f"×: {broken:,} value{'s' * (broken > 1)} not finite")
    if clipped:
        far = max(clipped, key=abs)
        notes.append(f"outside the frame: {len(clipped):,}, farthest {number(far, 3)}")
    return [fitted(n, WIDTH) for n in notes]
