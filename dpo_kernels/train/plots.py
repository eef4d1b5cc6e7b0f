"""One picture of a run: loss, margin, accuracy and log-probs, of training and held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# (title, unit, (key, what the legend says before "train" and "held out"))
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", "nats", (("loss", ""),)),
    ("reward margin", "nats", (("rewards/margins", ""),)),
    ("reward accuracy", "share of pairs", (("rewards/accuracies", ""),)),
    (
        "log-prob of a completion",
        "nats",
        (("logps/chosen", "chosen, "), ("logps/rejected", "rejected, ")),
    ),
)


def plot_run(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the rows of metrics.jsonl into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    pairs = any("logps/chosen" in row or "eval_logps/chosen" in row for row in rows)
    panels = _PANELS if pairs else _PANELS[:1]  # supervised: a loss alone
    size = (2, 2) if len(panels) > 1 else (1, 1)
    figure = Figure(figsize=(5 * size[0], 3.5 * size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(*size, squeeze=False).flat
    for axis, (name, unit, series) in zip(axes, panels, strict=True):
        for i, (key, label) in enumerate(series):
            train = [(r["step"], r[key]) for r in rows if key in r]
            # held out, ties count one half: an untrained policy then starts at 0.5, not at 0
            eval_key = f"eval_{key}" + ("_ties_half" if key == "rewards/accuracies" else "")
            held = [(r["step"], r[eval_key]) for r in rows if eval_key in r]
            if train:
                axis.plot(*zip(*train, strict=True), color=f"C{i}", lw=1.3, label=f"{label}train")
            if held:
                axis.plot(
                    *zip(*held, strict=True),
                    color=f"C{i}",
                    lw=1.3,
                    ls="--",
                    marker="o",
                    ms=5,
                    label=f"{label}held out",
                )
        axis.set_title(name)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
