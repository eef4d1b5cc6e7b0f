"""The frame of every page: head, style, tables, and the one place where text is escaped.

A page holds texts of data, models and judges. They are escaped, what no file can hold is written
as an escape, and the page's own policy forbids every script and every request: were something to
slip through, a browser would not run it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

MOST_CHARACTERS = 4000  # of one text; the files of the run have all of it
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")  # would turn the text behind them around


def plain(value: Any) -> str:
    """`value` as characters that a file can hold and that stand where they are written."""
    found = str(value).replace("\r\n", "\n").encode("utf-8", "backslashreplace").decode("utf-8")
    found = _TURNS.sub(lambda turn: f"\\u{ord(turn[0]):04x}", found)
    return _CONTROL.sub("\ufffd", found)


def text(value: Any) -> str:
    """`value` as text that HTML and SVG show and do not read."""
    return html.escape(plain(value), quote=True)


def prose(value: Any) -> str:
    """A text of the data or a model: spaces and lines kept, its direction its own."""
    whole = "" if value is None else str(value)
    cut = whole[:MOST_CHARACTERS]
    left = len(whole) - len(cut)
    more = f'<span class="more">… {left:,} more characters</span>' if left else ""
    if not whole:
        return '<span class="more">(empty)</span>'
    return f'<div class="prose" dir="auto">{text(cut)}{more}</div>'


def section(title: str, *parts: str, note: str = "") -> str:
    """A part of the page; nothing where there is nothing to show."""
    body = "\n".join(p for p in parts if p)
    if not body:
        return ""
    said = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<section id="{anchor(title)}"><h2>{text(title)}</h2>{said}\n{body}</section>'


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def grid(charts: Iterable[str]) -> str:
    """Charts side by side, as many as the screen has room for."""
    found = [f"<figure>{c}</figure>" for c in charts if c]
    return f'<div class="grid">{"".join(found)}</div>' if found else ""


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    marked: Sequence[bool] = (),
    words: Sequence[int] = (0,),
    kind: str = "",
) -> str:
    """A table whose cells are HTML already; the columns `words` are texts, the others numbers."""
    lines = list(rows)
    if not lines:
        return ""

    def cells(row: Sequence[str], tag: str) -> str:
        names = (f"<{tag}>" if i in words else f'<{tag} class="n">' for i in range(len(row)))
        return "".join(f"{n}{c}</{tag}>" for n, c in zip(names, row, strict=True))

    body = []
    for i, row in enumerate(lines):
        mark = ' class="ours"' if i < len(marked) and marked[i] else ""
        body.append(f"<tr{mark}>{cells(row, 'td')}</tr>")
    kind = f' class="{kind}"' if kind else ""
    return (
        f'<div class="wide"><table{kind}><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Key figures: (name, value), both plain text; a line of a value is not broken."""
    found = []
    for name, value in pairs:
        lines = "".join(f'<div class="line">{text(line)}</div>' for line in value.split("\n"))
        found.append(f"<div><dt>{text(name)}</dt><dd>{lines}</dd></div>")
    return f'<dl class="tiles">{"".join(found)}</dl>' if found else ""


def details(title: str, body: str) -> str:
    return f"<details><summary>{text(title)}</summary>{body}</details>" if body else ""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole file. `lead` is HTML below the heading."""
    parts = [s for s in sections if s]
    named = re.findall(r'<section id="([^"]+)"><h2>(.*?)</h2>', "\n".join(parts))
    links = "".join(f'<a href="#{i}">{name}</a>' for i, name in named)
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>
{STYLE}</style></head><body>
<header><h1>{text(title)}</h1>{lead}<nav>{links}</nav></header>
<main>
{body}
</main>
<footer>written by dpo-kernels report</footer>
</body></html>
"""


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# Colours of lines: of one lightness each, so that every one is legible as text on its ground.
LIGHT = ("#0b5cad", "#b5400e", "#1a7347", "#84389b", "#7d5c00", "#ac2163", "#0b737b", "#5a5a5a")
DARK = ("#6cb2ff", "#ff9466", "#5fd08f", "#d29bff", "#e0bc50", "#ff86ba", "#56c9d3", "#b8b8b8")


def _colours(values: Sequence[str]) -> str:
    return " ".join(f"--s{i}: {v};" for i, v in enumerate(values))


GROUND = {
    "light": "--ground: #fff; --ink: #1c2024; --soft: #5c646c; --line: #d9dde1; --panel: #f6f7f8; "
    "--ours: #fdf0ea;",
    "dark": "--ground: #14171a; --ink: #e6e8ea; --soft: #a3abb3; --line: #363c42; "
    "--panel: #1c2024; --ours: #33251d;",
}
# What a chart needs, wherever it stands: in a page or in a file of its own.
CHART_STYLE = (
    f":root {{ {GROUND['light']} {_colours(LIGHT)} }}\n"
    "@media (prefers-color-scheme: dark) {\n"
    f":root {{ {GROUND['dark']} {_colours(DARK)} }} }}\n"
    + "".join(f".c{i} {{ color: var(--s{i}) }} " for i in range(len(LIGHT)))
    + """
svg { font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
svg text { fill: var(--ink); white-space: pre; paint-order: stroke; stroke: var(--ground);
  stroke-width: 3px; stroke-linejoin: round } svg .soft { fill: var(--soft) }
svg .title { font-weight: 600; font-size: 12.5px } svg .head { font-weight: 600 }
svg .own { fill: currentColor } svg .rule { stroke: var(--line); stroke-width: 1 }
svg .axis { stroke: var(--soft); stroke-width: 1 } svg .given { stroke: var(--soft) }
"""
)
STYLE = (
    CHART_STYLE
    + """* { box-sizing: border-box }
html { color-scheme: light dark; -webkit-text-size-adjust: 100% }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 0 auto;
  max-width: 84rem; padding: 1rem; background: var(--ground); color: var(--ink) }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .4rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem } h4 { margin: 1rem 0 .3rem }
p { margin: .3rem 0 .6rem; max-width: 60rem } .note, .more, footer { color: var(--soft) }
.note { font-size: .9rem } .warn { border-left: 4px solid var(--s1); padding: .3rem .8rem;
  background: var(--panel); overflow-wrap: anywhere }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0 }
a { color: var(--s0) } nav a { padding: .25rem 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr));
  gap: .5rem; margin: .5rem 0 1rem }
.tiles > div { background: var(--panel); border-radius: .4rem; padding: .5rem .7rem; min-width: 0 }
dt { color: var(--soft); font-size: .85rem } dd { margin: 0; font-weight: 600;
  font-variant-numeric: tabular-nums }
.line { white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.grid { display: grid; gap: 1.2rem 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
figure { margin: 0; min-width: 0; max-width: 30rem }
svg { display: block; width: 100%; height: auto }
.wide { overflow-x: auto; margin-bottom: .8rem } table { border-collapse: collapse }
td, th { padding: .2rem .7rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--soft); white-space: normal; vertical-align: bottom }
.n { text-align: right }
td.n { font-variant-numeric: tabular-nums } .ours { background: var(--ours) }
td:first-child:not(.n), table.plain td { white-space: normal; min-width: 7rem }
table.plain .n { text-align: left } .facts td { overflow-wrap: anywhere; max-width: 60rem }
td.note { white-space: normal; min-width: 14rem }
.cards { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; min-width: 0 }
.sides { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)) }
.sides > div { min-width: 0 } .label { color: var(--soft); font-size: .85rem; margin-top: .4rem;
  overflow-wrap: anywhere }
.prose { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  max-height: 24rem; overflow-y: auto }
.nowrap { white-space: nowrap }
pre { overflow-x: auto; background: var(--panel); padding: .6rem; border-radius: .4rem;
  font-size: .85rem } summary { cursor: pointer; padding: .4rem 0 }
@media (max-width: 30rem) { td, th { padding: .2rem .35rem } td:first-child, th:first-child {
  padding-left: 0 } td:first-child:not(.n) { min-width: 5.5rem } table { font-size: .92rem } }
footer { margin-top: 2rem; font-size: .85rem }
"""
)
