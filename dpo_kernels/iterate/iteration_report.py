"""The page of an iteration: curves over rounds, win rates, the judge, samples side by side."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import prompt_text, read_table

_PANELS = (
    ("win rate", (("win_rate_round0", "over round 0"), ("win_rate_previous", "over the previous"))),
    ("KL to the starting model, nats a sequence", (("kl/exact", "exact"), ("kl/k3", "k3"))),
    ("length of a sample", (("length", "characters"),)),
    ("diversity and repetition", (("diversity", "distinct pairs"), ("repetition", "repetition"))),
)


def write_report(folder: Path, summary: dict[str, Any], say: Callable[[str], None]) -> None:
    """`rounds.png` and `report.html` in the folder of an iteration."""
    try:
        plot_rounds(summary, folder / "rounds.png")
    except Exception as error:  # matplotlib is absent or broken: the loop is none the worse
        say(f"warning: rounds.png was not drawn: {error}")
    (folder / "report.html").write_text(page(folder, summary), encoding="utf-8")


def plot_rounds(summary: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    start = {"round": 0, "measures": {**summary["round0"], "kl/exact": 0.0, "kl/k3": 0.0}}
    for axis, (title, series) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for k, (key, label) in enumerate(series):
            if key.startswith("win_rate"):
                found = [(r["round"], r[key]) for r in summary["each"] if r.get(key)]
                found = [(n, w) for n, w in found if w["rate"] is not None]
                axis.errorbar(
                    [n + 0.04 * k for n, _ in found],
                    [w["rate"] for _, w in found],
                    yerr=[
                        [w["rate"] - w["low"] for _, w in found],
                        [w["high"] - w["rate"] for _, w in found],
                    ],
                    marker="o",
                    capsize=3,
                    label=label,
                )
            else:
                rows = [r for r in [start, *summary["each"]] if key in (r["measures"] or {})]
                axis.plot(
                    [r["round"] for r in rows],
                    [r["measures"][key] for r in rows],
                    marker="o",
                    label=label,
                )
        if title == "win rate":
            axis.axhline(0.5, color="grey", lw=0.8, ls=":")
            axis.set_ylim(0, 1)
        axis.set_title(title)
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def page(folder: Path, summary: dict[str, Any]) -> str:
    """The page as HTML; every text of a model or a judge is escaped."""
    rows = []
    for r in summary["each"]:
        judge, pairs, w = r["judge"], r["pairs"], r["win_rate_round0"]
        rate = (
            "-"
            if not w or w["rate"] is None
            else (f"{w['rate']:.3f} [{w['low']:.3f}, {w['high']:.3f}]")
        )
        cells = (
            r["round"],
            "yes" if r["promoted"] else "no",
            judge.get("judge", "-"),
            judge.get("verdicts", "-"),
            judge.get("ties", "-"),
            judge.get("errors", "-"),
            pairs.get("pairs", "-"),
            rate,
            r["ended"] or "",
        )
        rows.append("<tr>" + "".join(f"<td>{_e(c)}</td>" for c in cells) + "</tr>")
    head = "".join(
        f"<th>{h}</th>"
        for h in (
            "round",
            "promoted",
            "judge",
            "verdicts",
            "ties",
            "errors",
            "pairs",
            "win rate over round 0",
            "ended",
        )
    )
    return _PAGE.format(
        ended=_e(summary["ended"]),
        chart='<img src="rounds.png" alt="curves over rounds">'
        if (folder / "rounds.png").exists()
        else "",
        head=head,
        rows="\n".join(rows),
        samples=_samples(folder, summary),
    )


def _samples(folder: Path, summary: dict[str, Any], most: int = 8) -> str:
    """Samples of round 0 and of the promoted policy side by side."""
    best = summary["promoted_round"]
    file = folder / "rounds" / f"{best:03d}" / "wins_round0.jsonl"
    if not best or not file.exists():
        return "<p>no round was promoted</p>"
    lines = []
    for row in read_table(file)[:most]:
        verdict = "error" if row["error"] else "tie" if row["tie"] else f"p = {row['p_first']:.2f}"
        texts = (prompt_text(row["prompt"]), row["old"], row["new"], verdict)
        lines.append("<tr>" + "".join(f"<td>{_e(t)}</td>" for t in texts) + "</tr>")
    return (
        f"<table><tr><th>prompt</th><th>round 0</th><th>round {best}</th><th>verdict</th></tr>"
        + "\n".join(lines)
        + "</table>"
    )


def _e(value: Any) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dpo-kernels: iteration</title>
<style>body{{font:15px sans-serif;margin:2em;max-width:70em}}table{{border-collapse:collapse}}
td,th{{border:1px solid #ccc;padding:.3em .6em;vertical-align:top;text-align:left}}
td{{white-space:pre-wrap}}img{{max-width:100%}}</style></head><body>
<h1>Iteration</h1><p>The loop ended: {ended}.</p>
{chart}
<h2>Rounds</h2><table><tr>{head}</tr>{rows}</table>
<h2>Held-out prompts, before and after</h2>{samples}
</body></html>
"""
