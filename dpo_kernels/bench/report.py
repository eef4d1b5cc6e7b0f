"""Results files as one page and its charts: `dpo-kernels report PATH`.

The page is one HTML file with its pictures inside (SVG, and PNG for readers that show none); the
charts are files beside it too.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import results
from .cases import grown_in

COLOURS = {True: "#c44e52", False: "#4c72b0"}  # ours, others
OTHERS = ("C0", "C1", "C2", "C4", "C5", "C6", "C7", "C8", "C9")  # lines of several others


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


def write_report(files: Sequence[Path], folder: Path) -> Path:
    """`report.html` and charts of the results files into `folder`; the page's path."""
    runs = [(path, results.read(path)) for path in files]
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD]
    for path, run in runs:
        charts = []
        for number, (title, draw) in enumerate(_charts(run["rows"])):
            chart = folder / f"{path.stem}-{number}.png"
            draw(chart)
            draw(chart.with_suffix(".svg"))
            charts.append((title, chart))
        parts.append(_section(path.name, run, charts))
    page = folder / "report.html"
    page.write_text("\n".join([*parts, "</body></html>\n"]))
    return page


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


def _section(name: str, run: dict[str, Any], charts: list[tuple[str, Path]]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    lines = [
        f"<h2>{html.escape(run['device'])}</h2>",
        f"<p>{html.escape(name)}: {run['date']}, {run['threads']} threads, load "
        f"{run['load']} before the run, commit {run['commit'][:12]}; "
        f"{html.escape(versions)}</p>",
    ]
    for title, chart in charts:
        png, svg = (
            base64.b64encode(chart.with_suffix(kind).read_bytes()).decode()
            for kind in (".png", ".svg")
        )
        lines.append(
            f"<h3>{html.escape(title)}</h3>"
            f'<picture><source type="image/svg+xml" srcset="data:image/svg+xml;base64,{svg}">'
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,{png}"></picture>'
        )
    lines.append("<h3>All figures</h3>")
    for case, rows in results.by_case(run["rows"]).items():
        ours = results.best_of_ours(rows)
        table = [[row["provider"], *cells_of(row, ours), row["note"]] for row in rows]
        filled = [i for i, name in enumerate(_COLUMNS) if any(cells[i] for cells in table)]
        lines.append(
            f"<h4>{html.escape(results.shown(case))}</h4><div><table><tr>"
            + "".join(f"<th>{_COLUMNS[i]}" for i in filled)
            + "</tr>"
        )
        for row, cells in zip(rows, table, strict=True):
            mark = ' class="ours"' if row["ours"] else ""
            text = "".join(
                f"<td{' class=note' * (i == _NOTE)}>{html.escape(cells[i])}" for i in filled
            )
            lines.append(f"<tr{mark}>{text}</tr>")
        lines.append("</table></div>")
    return "\n".join(lines)


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


def _charts(rows: list[dict[str, Any]]):
    """(title, function that draws it) of what the rows hold."""
    timed = [r for r in rows if r.get("seconds")]
    plain = [r for r in timed if not r.get("series")]
    for suite in dict.fromkeys(r["suite"] for r in plain):
        group = [r for r in plain if r["suite"] == suite]
        yield f"{suite}: time", lambda path, g=group: _bars(path, g, "seconds", 1e3, "ms")
    weighed = [r for r in rows if r["peak bytes"] is not None]
    single = [r for r in weighed if not r.get("series")]
    for suite in dict.fromkeys(r["suite"] for r in single):
        group = [r for r in single if r["suite"] == suite]
        yield (
            f"{suite}: peak memory above the inputs",
            lambda path, g=group: _bars(path, g, "peak bytes", 2**-20, "MiB"),
        )
    floored = [r for r in plain if r["floor"]]
    if floored:
        yield "percent of the floor", lambda path: _floor(path, floored)
    kinds = (
        ("time", timed, "seconds", 1e3, "ms"),
        ("peak memory above the inputs", weighed, "peak bytes", 2**-20, "MiB"),
    )
    for what, some, key, factor, unit in kinds:
        for series in dict.fromkeys(r["series"] for r in some if r.get("series")):
            group = [r for r in some if r.get("series") == series]
            arguments = (group, series, key, factor, unit)
            yield f"{series}: {what}", lambda path, arguments=arguments: _lines(path, *arguments)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(path, dpi=110)


def _bars(path: Path, rows: list[dict[str, Any]], key: str, factor: float, unit: str) -> None:
    cases = results.by_case(rows)
    count = sum(len(group) + 1.4 for group in cases.values())
    figure = _figure(9, 0.6 + 0.27 * count)
    axis = figure.subplots()
    at, ticks, labels = 0.0, [], []
    for case, group in cases.items():
        axis.text(
            0.0,
            at,
            results.shown(case),
            fontsize=8,
            weight="bold",
            va="center",
            transform=axis.get_yaxis_transform(),
        )
        for row in group:
            at += 1
            value = row[key] * factor
            axis.barh(at, value, color=COLOURS[row["ours"]], height=0.75)
            end = value
            if key == "seconds":
                end = max(value, row["p80"] * factor)
                ends = [[value - row["p20"] * factor], [row["p80"] * factor - value]]
                axis.errorbar(value, at, xerr=ends, color="black", lw=0.8, capsize=2)
            axis.text(end, at, f"  {value:.3g}", fontsize=7, va="center")
            ticks.append(at)
            labels.append(row["provider"])
        at += 1.4
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.set_ylim(at - 0.7, -0.8)
    largest = max(r["p80" if key == "seconds" else key] for r in rows) * factor
    axis.set_xlim(0, 1.12 * largest)
    axis.set_xlabel(unit)
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _floor(path: Path, rows: list[dict[str, Any]]) -> None:
    mine = [r for r in rows if r["ours"]]
    figure = _figure(9, 0.8 + 0.3 * len(mine))
    axis = figure.subplots()
    for at, row in enumerate(mine):
        percent = 100 * row["floor"] / row["seconds"]
        axis.barh(at, percent, color=COLOURS[True], height=0.7)
        axis.text(percent, at, f"  {percent:.0f}", fontsize=7, va="center")
    names = [f"{results.shown(r['case'])}\n{r['provider']}" for r in mine]
    axis.set_yticks(range(len(mine)), names, fontsize=6)
    axis.invert_yaxis()
    axis.axvline(100, color="black", lw=1)
    axis.set_xlabel("percent of the floor (a copy's bandwidth, or the bare products)")
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _lines(
    path: Path, rows: list[dict[str, Any]], series: str, key: str, factor: float, unit: str
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = _figure(8, 4.5)
    axis = figure.subplots()
    others = 0
    for provider in dict.fromkeys(r["provider"] for r in rows):
        mine = [r for r in rows if r["provider"] == provider]
        # What needs nothing has no place on a logarithm.
        points = sorted((r["x"], r[key] * factor) for r in mine if r[key] * factor >= 0.01)
        if not points:
            continue
        ours = mine[0]["ours"]
        colour = COLOURS[True] if ours else OTHERS[others % len(OTHERS)]
        others += not ours
        # Ours is the wide line below: a thin one of the same values stays visible on it.
        axis.plot(
            *zip(*points, strict=True),
            marker="o",
            ms=4,
            label=provider,
            color=colour,
            lw=4.0 if ours else 1.2,
            ls="--" if "in place" in provider else "-",
            zorder=2 if ours else 3,
        )
    floors = {(r["x"], r["floor"] * factor) for r in rows if r["ours"] and r.get("floor")}
    if floors:
        axis.plot(*zip(*sorted(floors), strict=True), color="black", ls=":", label="floor")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=10)
    grown = sorted({r["x"] for r in rows})
    axis.set_xticks(grown, [f"{x:g}" for x in grown])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(grown_in(series))
    axis.set_ylabel(unit)
    axis.set_title(series, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(figure, path)


_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dpo-kernels benchmarks</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
div { overflow-x: auto } table { border-collapse: collapse; margin-bottom: 1rem }
td, th { padding: .15rem .7rem; text-align: left; border-bottom: 1px solid #ddd }
td, th { white-space: nowrap } td.note { white-space: normal; min-width: 14rem }
.ours { background: #fbeceb } img { max-width: 100%; height: auto } h4 { margin-bottom: .3rem }
</style></head><body><h1>dpo-kernels benchmarks</h1>
<p>Red is dpo-kernels. Times are medians of rounds that the providers take in turns, with the 20th
and 80th percentile; the floor is a copy's bandwidth, or the bare matrix products, measured in the
same turns; errors are against float64. Read ratios of one run, not milliseconds of two.</p>"""

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
    parts += [_script_table(file) for file in sorted(folder.glob("*-trl-script.json"))]
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
        f"`results/{BF16_HEAD}`): with AVX512-BF16 we multiply bf16 and sum and write in fp32, "
        "without it the weight is widened; torch and the peers write bf16, whose rounding their "
        "log-probs carry. Ours, and what is faster:",
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


def _script_table(file: Path) -> str:
    """What `benchmarks/compare_trl.py` wrote, in Markdown."""
    run = json.loads(file.read_text())
    lines = [
        f"One DPO script written for TRL {run['versions']['trl']}, as it is and patched, "
        f"{run['device']}, {run['threads']} threads, {run['date'][:10]} "
        f"([{file.name}](../benchmarks/results/{file.name})):",
        "",
        "| | s/step | of TRL's speed | peak MB | of it for training |",
        "|---|---|---|---|---|",
    ]
    for name, r in run["results"].items():
        lines.append(
            f"| {name} | {r['seconds_per_step']:.2f} | {r['speedup']:.2f}x | "
            f"{r['peak_mb']:.0f} | {r['training_mb']:.0f} |"
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
