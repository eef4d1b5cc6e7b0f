"""Results files as one page and its charts: `dpo-kernels report PATH`.

The page is in the design of all pages (`dpo_kernels.report`); its charts are SVG files beside it
as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..report.bars import Bar, bar_chart
from ..report.chart_parts import file_of
from ..report.charts import Chart, Series, line_chart
from ..report.html_page import grid, page, section, table, text
from . import results
from .cases import grown_in
from .script_tables import script_tables

OURS, OTHER, FLOOR = 1, 0, 7  # styles of bars and lines
OTHERS = (0, 2, 3, 4, 5, 6)  # of lines of several others


_COLUMNS = (
    "provider",
    "median",
    "20-80 %",
    "x ours",
    "of floor",
    "peak memory",
    "error",
    "note",
)


_NOTE = _COLUMNS.index("note")


def write_report(files: Sequence[Path], out: Path) -> Path:
    """The page of the results files, and their charts beside it; the page's path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sections = []
    for path in files:
        run = results.read(path)
        charts = [chart for chart in _charts(run["rows"]) if chart]
        for number, chart in enumerate(charts):
            file = out.with_name(f"{path.stem}-{number}.svg")
            file.write_text(file_of(chart), encoding="utf-8")
        sections.append(_section(path.name, run, charts))
    out.write_text(page("dpo-kernels benchmarks", _LEAD, sections), encoding="utf-8")
    return out


def results_in(path: Path) -> list[Path]:
    """The results files that a path names: itself, or those of a folder."""
    if path.is_file():
        return [path]
    found = []
    for file in sorted(path.glob("*.json")):
        try:
            results.read(file)
        except ValueError:
            continue
        found.append(file)
    return found


def _section(name: str, run: dict[str, Any], charts: list[str]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    parts = [
        f"<p>{text(name)}: {text(run['date'])}, {text(run['threads'])} threads, load "
        f"{text(run['load'])} before the run, commit {text(run['commit'][:12])}; "
        f"{text(versions)}</p>",
        grid(charts),
        "<h3>All figures</h3>",
    ]
    for case, rows in results.by_case(run["rows"]).items():
        ours = results.best_of_ours(rows)
        cells = [[row["provider"], *cells_of(row, ours), row["note"]] for row in rows]
        filled = [i for i, name in enumerate(_COLUMNS) if any(line[i] for line in cells)]
        parts.append(f"<h4>{text(results.shown(case))}</h4>")
        parts.append(
            table(
                [_COLUMNS[i] for i in filled],
                [[text(line[i]) for i in filled] for line in cells],
                [row["ours"] for row in rows],
                words=[k for k, i in enumerate(filled) if i in (0, _NOTE)],
            )
        )
    return section(f"{run['device']}, {name}", *parts)


def cells_of(row: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    """median, spread, x ours, percent of floor, memory, error; empty where there is none."""
    seconds, memory = row.get("seconds"), row["peak bytes"]
    return [
        f"{seconds * 1e3:.4g} ms" if seconds else "",
        f"{row['p20'] * 1e3:.4g}-{row['p80'] * 1e3:.4g}" if seconds else "",
        f"{seconds / ours['seconds']:.2f}" if seconds and ours else "",
        f"{100 * row['floor'] / seconds:.0f} %" if seconds and row["floor"] else "",
        f"{memory / 2**20:.0f} MiB" if memory is not None else "",
        f"{row['error']:.0e}" if row["error"] is not None else "",
    ]


def _charts(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the rows hold, as charts."""
    timed = [r for r in rows if r.get("seconds")]
    plain = [r for r in timed if not r.get("series")]
    for suite in dict.fromkeys(r["suite"] for r in plain):
        group = [r for r in plain if r["suite"] == suite]
        yield _bars(f"{suite}: time", group, "seconds", 1e3, "ms")
    weighed = [r for r in rows if r["peak bytes"] is not None]
    single = [r for r in weighed if not r.get("series")]
    for suite in dict.fromkeys(r["suite"] for r in single):
        group = [r for r in single if r["suite"] == suite]
        yield _bars(f"{suite}: peak memory above the inputs", group, "peak bytes", 2**-20, "MiB")
    floored = [r for r in plain if r["floor"] and r["ours"]]
    if floored:
        yield _floor(floored)
    kinds: tuple[tuple[str, list[dict[str, Any]], str, float, str], ...] = (
        ("time", timed, "seconds", 1e3, "ms"),
        ("peak memory above the inputs", weighed, "peak bytes", 2**-20, "MiB"),
    )
    for what, some, key, factor, unit in kinds:
        for series in dict.fromkeys(r["series"] for r in some if r.get("series")):
            group = [r for r in some if r.get("series") == series]
            yield _lines(f"{series}: {what}", group, series, (key, factor, unit))


def _bars(title: str, rows: list[dict[str, Any]], key: str, factor: float, unit: str) -> str:
    groups = []
    for case, group in results.by_case(rows).items():
        bars = []
        for row in group:
            spread = (row["p20"] * factor, row["p80"] * factor) if key == "seconds" else None
            style = OURS if row["ours"] else OTHER
            bars.append(Bar(row["provider"], row[key] * factor, style, spread))
        groups.append((results.shown(case), bars))
    return bar_chart(title, unit, groups)


def _floor(rows: list[dict[str, Any]]) -> str:
    bars = []
    for row in rows:
        percent = 100 * row["floor"] / row["seconds"]
        shown = results.shown(row["case"])
        bars.append(
            (f"{shown}, {row['provider']}", [Bar("", percent, OURS, None, f"{percent:.0f} %")])
        )
    unit = "percent of a copy's bandwidth, or of the bare products"
    return bar_chart("percent of the floor", unit, bars, (100.0, "the floor"))


def _lines(
    title: str,
    rows: list[dict[str, Any]],
    series: str,
    measure: tuple[str, float, str],
) -> str:
    key, factor, unit = measure
    lines, others = [], 0
    for provider in dict.fromkeys(r["provider"] for r in rows):
        mine = [r for r in rows if r["provider"] == provider]
        # What needs nothing has no place on a logarithm.
        points = sorted((float(r["x"]), r[key] * factor) for r in mine if r[key] * factor >= 0.01)
        if not points:
            continue
        style = OURS if mine[0]["ours"] else OTHERS[others % len(OTHERS)]
        others += not mine[0]["ours"]
        dash = 1 if "in place" in provider else None if style != OURS else 0
        lines.append(Series(provider, points, style, dash, mark_all=True))
    floors = {(float(r["x"]), r["floor"] * 1e3) for r in rows if r["ours"] and r.get("floor")}
    if floors and unit == "ms":
        lines.append(Series("floor", sorted(floors), FLOOR, mark_all=True))
    grown = sorted({float(r["x"]) for r in rows})
    return line_chart(
        Chart(title, grown_in(series), unit, lines, log_x=2.0, log_y=True, ticks_x=grown)
    )


_LEAD = """<p>Red is dpo-kernels. Times are medians of rounds that the providers take in turns,
with the 20th and 80th percentile; the floor is a copy's bandwidth, or the bare matrix products,
measured in the same turns; errors are against float64. Read ratios of one run, not milliseconds of
two.</p>"""

README_PEERS = {
    "torch eager": ("torch eager",),
    "torch.compile": ("torch.compile",),
    "TRL": ("TRL chunked log-probs", "TRL selective_log_softmax"),
    "TRL, scored rows": ("TRL chunked log-probs, scored rows",),
    "Liger DPO": ("Liger DPO",),
    "cut-cross-entropy": ("cut-cross-entropy",),
}


def readme_tables(folder: Path) -> str:
    """Tables of a folder's results files for docs/benchmarks.md; series are for charts."""
    parts = []
    for file in results_in(folder):
        run = results.read(file)
        if all(row.get("series") for row in run["rows"]):
            continue  # for charts
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        parts.append(
            f"{run['device']}, {run['threads']} threads, {run['date'][:10]}, load {run['load']} "
            f"before the run ([{file.name}](../benchmarks/results/{file.name})): {versions}, "
            f"commit {run['commit'][:12]}."
        )
        parts.append(_readme_table(run["rows"]))
    parts += script_tables(folder)
    return "\n\n".join(parts)


BF16_HEAD = "cpu-linear-head-bf16.json"
BF16_HEAD_COMMAND = (
    'dpo-kernels bench --set full --case "SmolLM2-135M bf16 1024 tokens in 2 pairs, 50% scored" '
    f"--json benchmarks/results/{BF16_HEAD}"
)


def bf16_head(folder: Path) -> str:
    """For "Where peers win": ours and who is faster on a bf16 head, with both errors, from the
    results file; how to record it where there is none."""
    file = folder / BF16_HEAD
    if not file.is_file():
        return f"- Linear head in bf16: no results file yet. `{BF16_HEAD_COMMAND}` records it."
    run = results.read(file)
    lines = [
        f"- Linear head in bf16 ({run['device']}, {run['threads']} threads, {run['date'][:10]}, "
        f"`results/{BF16_HEAD}`): with AVX512-BF16 we multiply bf16 and write fp32, without it "
        "the weight is widened; torch and the peers write bf16, whose rounding their log-probs "
        "carry. Ours, and what is faster:",
        "",
        "  | case | provider | time | error of the loss or log-prob | of the gradient |",
        "  |---|---|---|---|---|",
    ]
    for case, group in results.by_case(run["rows"]).items():
        ours = results.best_of_ours(group)
        if ours is None:
            continue
        ahead = [r for r in group if not r["ours"] and r.get("seconds", math.inf) < ours["seconds"]]
        for row in [ours, *sorted(ahead, key=lambda r: r["seconds"])]:
            gradient = row["gradient error"]
            lines.append(
                f"  | {case} | {row['provider']} | {row['seconds'] * 1e3:.3g} ms | "
                f"{row['error']:.0e} | {'-' if gradient is None else f'{gradient:.0e}'} |"
            )
    return "\n".join(lines)


def _readme_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | ours | of the floor | " + " | ".join(README_PEERS) + " |",
        "|---|---|---|" + "---|" * len(README_PEERS),
    ]
    for case, group in results.by_case(r for r in rows if not r.get("series")).items():
        ours = results.best_of_ours(group)
        if ours:
            floor = f"{100 * ours['floor'] / ours['seconds']:.0f} %" if ours["floor"] else "-"
            cells = [f"{ours['seconds'] * 1e3:.3g} ms", floor]
            cells += [_ratio(group, names, "seconds", ours) for names in README_PEERS.values()]
        elif ours := results.best_of_ours(group, by="peak bytes"):
            cells = [f"{ours['peak bytes'] / 2**20:.0f} MiB", "-"]
            cells += [_ratio(group, names, "peak bytes", ours) for names in README_PEERS.values()]
        else:
            continue
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(group: list[dict[str, Any]], names: tuple[str, ...], key: str, ours: dict) -> str:
    for row in group:
        if row["provider"] in names and row.get(key):
            return (
                f"{row[key] / max(ours[key], 1):.1f}x"
                if key == "peak bytes"
                else (f"{row[key] / ours[key]:.1f}x")
            )
    return "-"
