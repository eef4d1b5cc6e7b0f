"""The chart and the page of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..report import write_page

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
    try:
        write_page([folder])
    except Exception as error:
        say(f"warning: report.html was not written: {error}")


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
