"""`sweep`: the same training for several betas, numbers of pairs and SFT weights, and its chart.

A run that has its summary is not made again, so a sweep that was cut goes on.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..train.config import load_config
from ..train.config_files import UserError
from ..train.console import Console
from ..train.job import run_job
from ..train.ranks_start import check_same, joined
from .manifest import read_json, write_json
from .records import file_digest, read_table, write_table

_SHOWN = (
    ("eval_rewards/accuracies", "reward accuracy"),
    ("eval_rewards/margins", "reward margin"),
    ("eval_logps/chosen", "log-prob of the chosen"),
)


@dataclass(frozen=True)
class Grid:
    """What is swept; an empty list leaves an option to `train`'s own."""

    beta: Sequence[float] = ()
    sft_weight: Sequence[float] = ()
    num_pairs: Sequence[int] = ()

    def points(self) -> list[dict[str, Any]]:
        """Every combination, as options."""
        axes = {k: list(dict.fromkeys(v)) for k, v in vars(self).items() if v}
        if not axes:
            raise UserError("sweep needs --betas, --sft_weights or --pair_counts")
        if any(n < 2 for n in self.num_pairs):
            raise UserError(f"pair_counts must be at least 2, got {min(self.num_pairs)}")
        return [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]


def run_sweep(
    grid: Grid, options: Mapping[str, Any], folder: str | Path, console: Console | None = None
) -> list[dict[str, Any]]:
    """Train at each point; rows {point, after, before, steps} in `sweep.jsonl`, and a chart."""
    folder, console = Path(folder), console or Console(quiet=True)
    with joined(options, console) as ranks:
        with ranks.together():
            points = grid.points()
            if grid.num_pairs and not options.get("dataset_name"):
                raise UserError(
                    "pair_counts needs dataset_name, the file of pairs they are drawn from"
                )
            held = _held_out(grid, options)
        if ranks.many:
            check_same(ranks, {"option betas, sft_weights, pair_counts": repr(points)})
        ranks.first_does(lambda: _same_sweep({**options, "held-out pairs": held}, folder))
        rows: list[dict[str, Any]] = []
        for i, point in enumerate(points, start=1):
            name = "_".join(f"{k}-{v:g}" for k, v in point.items())
            run = folder / name
            summary = run / "summary.json"
            ranks.within(f"run {i}")
            if not ranks.first_does(summary.exists):
                console.say(f"run {i} of {len(points)}: {name}")
                more = ranks.first_does(partial(_settings, point, held, options, folder))
                own = {"output_dir": str(run), "overwrite_output_dir": True}
                run_job({**options, **more, **own}, console, ranks)
            rows.append(ranks.first_does(partial(_row, point, summary)))
            ranks.first_does(lambda: write_table(folder / "sweep.jsonl", rows))
        ranks.first_does(lambda: _chart(rows, folder, console))
    return rows


def _row(point: dict[str, Any], summary: Path) -> dict[str, Any]:
    found = json.loads(summary.read_text(encoding="utf-8"))
    return {"point": point, **{k: found.get(k) for k in ("before", "after", "steps")}}


def _chart(rows: Sequence[dict[str, Any]], folder: Path, console: Console) -> None:
    try:
        plot_sweep(rows, folder / "sweep.png")
    except ImportError as error:
        console.say(f"warning: sweep.png was not drawn: {error}")


def _same_sweep(options: Mapping[str, Any], folder: Path) -> None:
    """Runs that are done stand for these options alone; the grid may grow."""
    file = folder / "sweep_options.json"
    known: dict[str, Any] = json.loads(json.dumps(dict(options), default=str))
    for name in ("dataset_name", "eval_file"):
        path = Path(str(options.get(name)))
        if path.is_file():
            known[f"{name} (its content)"] = file_digest(path)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    old = read_json(file)
    for name in sorted({*old, *known}):
        if old.get(name) != known.get(name):
            raise UserError(
                f"{name} is {known.get(name)!r}, but the runs in {folder} had {old.get(name)!r}; "
                "take the old value or another output_dir"
            )


def _held_out(grid: Grid, options: Mapping[str, Any]) -> int:
    """Pairs held out of every set, where the sets differ in size and no file is held out."""
    share = load_config(options).eval_fraction
    if not grid.num_pairs or options.get("eval_file") or share == 0:
        return 0
    return max(1, min(round(share * max(grid.num_pairs)), min(grid.num_pairs) // 2))


def _settings(
    point: dict[str, Any], held: int, options: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    settings = dict(point)
    count = settings.pop("num_pairs", None)
    if count is not None:
        rows = read_table(str(options["dataset_name"]))
        if count > len(rows):
            raise UserError(f"pair_counts: {count} of {len(rows)} pairs")
        # The smaller sets are parts of the larger ones, and all have the same held-out pairs.
        order = random.Random(options.get("seed", 42)).sample(range(len(rows)), len(rows))
        if held:
            settings["eval_file"] = str(folder / "held-out.jsonl")
            write_table(settings["eval_file"], [rows[i] for i in sorted(order[:held])])
        file = folder / f"pairs-{count}.jsonl"
        write_table(file, [rows[i] for i in sorted(order[held:count])])
        settings["dataset_name"] = str(file)
    return settings


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    names = list(rows[0]["point"])
    lines = ["".join(f"{n:>14}" for n in [*names, *(title for _, title in _SHOWN)])]
    for row in rows:
        values = [f"{row['point'][n]:g}" for n in names]
        values += [
            f"{row['after'][k]:.4f}" if k in (row["after"] or {}) else "-" for k, _ in _SHOWN
        ]
        lines.append("".join(f"{v:>14}" for v in values))
    return "\n".join(lines)


def plot_sweep(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out numbers over the option with the most values, a line for each of the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(rows[0]["point"])
    along = max(names, key=lambda n: len({r["point"][n] for r in rows}))
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(figure.subplots(1, len(_SHOWN)), _SHOWN, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            rest = ", ".join(f"{n} {row['point'][n]:g}" for n in names if n != along)
            if key in (row["after"] or {}):
                lines.setdefault(rest, []).append((row["point"][along], row["after"][key]))
        for label, line in lines.items():
            axis.plot(*zip(*sorted(line), strict=True), marker="o", label=label or None)
        axis.set_title(f"{title}, held out")
        axis.set_xlabel(along)
        axis.grid(alpha=0.3)
        if any(lines):
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
