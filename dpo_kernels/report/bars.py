"""Bars, a name and a number above each: long names have room on a phone too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .chart_parts import WIDTH, fitted, heading, svg, wide
from .charts import NUM_COLOURS
from .html_page import text
from .numbers_text import number, steps_between, tick_texts

_ROW, _HEAD = 27, 24
_END = WIDTH - 8


@dataclass(frozen=True)
class Bar:
    """One bar from zero; `spread` is an interval around its value."""

    label: str
    value: float
    style: int = 0
    spread: tuple[float, float] | None = None
    shown: str = ""  # the number in words; by itself if empty


def bar_chart(
    title: str,
    unit: str,
    groups: Sequence[tuple[str, Sequence[Bar]]],
    given: tuple[float, str] | None = None,
) -> str:
    """Groups of bars, each under its heading; `given` is a vertical line: (value, label)."""
    groups = [(head, [b for b in bars if math.isfinite(b.value)]) for head, bars in groups]
    every = [b for _, bars in groups for b in bars]
    if not every:
        return ""
    ends = [b.value for b in every] + [v for b in every for v in (b.spread or ())]
    ends += [given[0]] if given else []
    low, high = min(0.0, *ends), max(0.0, *ends)
    if low == high:
        high = 1.0

    def at(value: float) -> float:
        return 2 + (_END - 2) * (value - low) / (high - low)

    out = [heading(title)]
    y, body = 22.0, []
    if given:
        y += 14
        x = at(given[0])
        anchor = "end" if x > WIDTH / 2 else "start"
        out.append(
            f'<text class="soft" x="{x:.1f}" y="{y - 4:.1f}" text-anchor="{anchor}">'
            f"{text(given[1])}</text>"
        )
    first = y
    for head, bars in groups:
        if not bars:
            continue
        if head:
            for line in folded(head, WIDTH):
                y += 14
                body.append(f'<text class="name head" x="0" y="{y:.1f}">{text(line)}</text>')
            y += 2
        for bar in bars:
            body += _bar(bar, at, y)
            y += _ROW
        y += 6
    ticks = steps_between(low, high, 5)
    for tick, label in zip(ticks, tick_texts(ticks), strict=True):
        x = at(tick)
        out.append(f'<path class="rule" d="M{x:.1f} {first:.1f}V{y:.1f}"/>')
        half = wide(label) / 2
        body.append(
            '<text class="tick soft" text-anchor="middle" '
            f'x="{min(max(x, half), WIDTH - half):.1f}" y="{y + 13:.1f}">{text(label)}</text>'
        )
    if given:
        x = at(given[0])
        out.append(
            f'<path class="given" d="M{x:.1f} {first:.1f}V{y:.1f}" stroke-width="1.4" '
            'stroke-dasharray="2 3"/>'
        )
    body.append(
        f'<text class="soft" text-anchor="middle" x="{WIDTH / 2}" y="{y + 28:.1f}">'
        f"{text(fitted(unit, WIDTH))}</text>"
    )
    return svg(y + 34, title, [*out, *body])


def _bar(bar: Bar, at, y: float) -> list[str]:
    shown = bar.shown or number(bar.value, 3)
    room = WIDTH - wide(shown) - 14
    zero, end = at(0.0), at(bar.value)
    out = [
        f'<text class="name" x="4" y="{y + 12:.1f}">{text(fitted(bar.label, room))}</text>',
        f'<text class="value" text-anchor="end" x="{WIDTH - 4}" y="{y + 12:.1f}">{text(shown)}'
        "</text>",
        f'<g class="c{bar.style % NUM_COLOURS}"><rect x="{min(zero, end):.1f}" y="{y + 15.5:.1f}" '
        f'width="{max(abs(end - zero), 1):.1f}" height="7" fill="currentColor"/></g>',
    ]
    if bar.spread:
        a, b = at(bar.spread[0]), at(bar.spread[1])
        out.append(
            f'<path d="M{a:.1f} {y + 19:.1f}H{b:.1f}M{a:.1f} {y + 16:.1f}v6'
            f'M{b:.1f} {y + 16:.1f}v6" stroke="var(--ink)" stroke-width="1.1" fill="none"/>'
        )
    return out


def folded(label: str, width: float) -> list[str]:
    """The label in lines of at most this width, broken at spaces; a longer word is cut."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or wide(longer, True) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [fitted(line, width, True) for line in lines if line]
