"""What a chart is made of: labels and their widths, markers, the frame, files.

There is no browser to ask how wide a label is. Widths are those of a wide font, so that what has
room here has it in the reader's font too.
"""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import east_asian_width

from .html_page import CHART_STYLE, plain, text
from .numbers_text import number

WIDTH = 360  # of every chart, in units of its text: 11 of them are a line
TITLE = 12.5 / 11  # the size of a title, of the other text's
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down")

_NARROW = set(" !'(),./:;I[]`fijlrt|")
_BROAD = set("%&@MWmw—…→\ufffd")
_SIGNS = set("<>=+~−×")


def wide(label: str, bold: bool = False) -> float:
    """The width of a label at the 11 units of a chart, in a wide font (DejaVu Sans, Verdana)."""
    ems = 0.0
    for c in label:
        if c in _NARROW:
            ems += 0.41
        elif c in _BROAD or ord(c) > 0x2E7F or east_asian_width(c) in "WF":
            ems += 1.03
        elif c in _SIGNS:
            ems += 0.84
        else:
            ems += 0.72 if c.isupper() else 0.64
    return 11.0 * ems * (1.12 if bold else 1.0)


def fitted(label: str, width: float, bold: bool = False) -> str:
    """The label, its middle left out where it is wider than `width`."""
    label = " ".join(plain(label).split())
    keep = len(label)
    cut = label
    while wide(cut, bold) > width and keep > 2:
        keep -= max(1, (keep - int(width / 11)) // 4)
        cut = label[: keep - keep // 2] + "…" + label[len(label) - keep // 2 :]
    return cut


def heading(title: str) -> str:
    shown = fitted(title, WIDTH / TITLE, True)
    return f'<text class="title" x="0" y="12">{text(shown)}</text>'


def short(value: float, width: float) -> str:
    """A number with as many digits as have room; never a part of one."""
    return next(
        (s for s in (number(value, digits) for digits in (3, 2)) if wide(s) <= width),
        f"{value:.0e}".replace("e+0", "e").replace("e-0", "e−").replace("-", "−"),
    )


def marker(shape: str, x: float, y: float, r: float = 2.8) -> str:
    x, y = round(x, 1), round(y, 1)
    style = 'fill="currentColor" stroke="var(--ground)" stroke-width=".6"'
    if shape == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r:.1f}" {style}/>'
    if shape == "square":
        return (
            f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}" '
            f"{style}/>"
        )
    if shape == "cross":
        return (
            f'<path d="M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}m0 {-2 * r:.1f}'
            f'l{-2 * r:.1f} {2 * r:.1f}" stroke="currentColor" stroke-width="1.6"/>'
        )
    r *= 1.25
    if shape == "diamond":
        d = f"M{x} {y - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}Z"
    elif shape == "down":
        d = f"M{x} {y + r:.1f}l{-r:.1f} {-1.7 * r:.1f}h{2 * r:.1f}Z"
    else:
        d = f"M{x} {y - r:.1f}l{r:.1f} {1.7 * r:.1f}h{-2 * r:.1f}Z"
    return f'<path d="{d}" {style}/>'


def spread_out(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places in the order of `wanted` (ascending), at least `apart`, within low and high."""
    groups: list[list[float]] = []  # [sum, count]
    for y in wanted:
        groups.append([y, 1.0])
        while len(groups) > 1:
            (a, n), (b, m) = groups[-2], groups[-1]
            if b / m - (m - 1) / 2 * apart - (a / n + (n - 1) / 2 * apart) >= apart:
                break
            groups[-2:] = [[a + b, n + m]]
    places: list[float] = []
    for total, n in groups:
        middle = total / n
        places += [middle + (k - (n - 1) / 2) * apart for k in range(int(n))]
    for i in range(len(places)):
        places[i] = max(places[i], low if i == 0 else places[i - 1] + apart)
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], high if i == len(places) - 1 else places[i + 1] - apart)
    return places


def svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{text(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def file_of(chart: str) -> str:
    """A chart as a file of its own."""
    at = chart.index(">") + 1
    ground = '<rect width="100%" height="100%" style="fill: var(--ground)"/>'
    return f"{chart[:at]}<style>{CHART_STYLE}</style>{ground}{chart[at:]}\n"
