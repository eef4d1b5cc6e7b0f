"""What `frontier.py` found, in words and as a chart: whichever way it falls."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

Line = dict[str, Any]


def at_kl(points: list[Line], kl: float) -> float | None:
    """Reward at a KL, between the two points around it; None outside of them."""
    ordered = sorted(points, key=lambda p: p["kl"])
    for a, b in itertools.pairwise(ordered):
        if a["kl"] <= kl <= b["kl"]:
            t = (kl - a["kl"]) / max(b["kl"] - a["kl"], 1e-12)
            return a["reward"] + t * (b["reward"] - a["reward"])
    return None


def conclusions(rows: list[Line]) -> list[str]:
    """Is the front ordered by beta; is iterative above offline at equal KL: whichever way."""
    start = next(row for row in rows if row["mode"] == "start")["points"]
    fused = [row for row in rows if row.get("path") == "fused"]
    lines = []
    for mode in ("offline", "iterative"):
        mine = [r for r in fused if r["mode"] == mode]
        means = {}
        for beta in sorted({r["beta"] for r in mine}):
            last = [r["points"][-1] for r in mine if r["beta"] == beta]
            means[beta] = [sum(p[k] for p in last) / len(last) for k in ("kl", "reward")]
        for k, what in enumerate(("KL", "reward")):
            values = [means[b][k] for b in means]
            falls = all(a > b for a, b in itertools.pairwise(values))
            shown = ", ".join(f"{b:g}: {means[b][k]:.3f}" for b in means)
            lines.append(
                f"{mode}: {what} {'falls' if falls else 'does NOT fall'} with beta ({shown})"
            )
    return lines + _at_equal_kl(fused, start) + _paths(rows)


def _at_equal_kl(fused: list[Line], start: list[Line]) -> list[str]:
    """Iterative against offline: each seed by itself, at eight places of the KL both reach."""
    means, above, places, reach = {}, 0, 0, 0.0
    for seed in sorted({r["seed"] for r in fused}):
        fronts = [
            start
            + [p for r in fused if (r["mode"], r["seed"]) == (mode, seed) for p in r["points"]]
            for mode in ("offline", "iterative")
        ]
        most = min(max(p["kl"] for p in points) for points in fronts)
        gaps = []
        for i in range(1, 9):
            offline, iterative = (at_kl(points, most * i / 9) for points in fronts)
            if offline is not None and iterative is not None:
                gaps.append(iterative - offline)
        if gaps:
            means[seed] = sum(gaps) / len(gaps)
            above, places = above + sum(g > 0 for g in gaps), places + len(gaps)
            reach = max(reach, most)
    if not means:
        return []
    mean = sum(means.values()) / len(means)
    each = ", ".join(f"seed {seed}: {gap:+.3f}" for seed, gap in means.items())
    return [
        f"at equal KL (up to {reach:.1f}) iterative is {'above' if mean > 0 else 'below'} offline "
        f"by {abs(mean):.3f} in reward on average ({each}), above at {above} of {places} places"
    ]


def _paths(rows: list[Line]) -> list[str]:
    """How far the points of the fused path lie from those of plain torch."""
    by = {(r["mode"], r["beta"], r["seed"], r["path"]): r["points"] for r in rows if "beta" in r}
    twins = [
        pair
        for key, points in by.items()
        if key[3] == "fused" and (other := by.get((*key[:3], "plain")))
        for pair in zip(points, other, strict=True)
    ]
    if not twins:
        return []
    gaps = {m: [a[m] - b[m] for a, b in twins] for m in ("reward", "kl")}
    mean = {m: sum(g) / len(g) for m, g in gaps.items()}
    worst = {m: max(map(abs, g)) for m, g in gaps.items()}
    return [
        f"fused less plain torch, at {len(twins)} points: reward {mean['reward']:+.4f}, KL "
        f"{mean['kl']:+.4f} on average; the points differ by at most {worst['reward']:.4f} in "
        f"reward, and in KL they differ by at most {worst['kl']:.4f}"
    ]


def draw(rows: list[Line], path: Path) -> None:
    """A line for each mode and beta: the mean of its seeds, with bars from lowest to highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    lines: dict[tuple[str, float, str], list[list[Line]]] = {}
    for row in rows:
        if row["mode"] != "start":
            lines.setdefault((row["mode"], row["beta"], row["path"]), []).append(row["points"])
    betas = sorted({beta for _, beta, _ in lines})
    start = rows[0]["points"][0]["reward"]
    for (mode, beta, way), seeds in sorted(lines.items()):
        x, y = (
            torch.tensor([[p[m] for p in points] for points in seeds]) for m in ("kl", "reward")
        )
        color, label = f"C{betas.index(beta)}", f"{mode}, beta {beta:g}"
        if way == "plain":
            axis.plot(x.mean(0), y.mean(0), color=color, ls="", marker="x", ms=9, zorder=3)
            continue
        axis.plot([0.0, *x.mean(0)], [start, *y.mean(0)], color=color, ls=_DASH[mode], label=label)
        axis.errorbar(
            x.mean(0),
            y.mean(0),
            xerr=[x.mean(0) - x.amin(0), x.amax(0) - x.mean(0)] if len(seeds) > 1 else None,
            yerr=[y.mean(0) - y.amin(0), y.amax(0) - y.mean(0)] if len(seeds) > 1 else None,
            color=color,
            ls="",
            marker="o" if mode == "iterative" else "s",
            ms=4,
            elinewidth=0.8,
            alpha=0.8,
        )
    axis.set_title(_what_is_drawn(lines), fontsize="medium")
    axis.set_xlabel("KL to the starting model, exact, nats a sequence")
    axis.set_ylabel("reward (VADER compound)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


_DASH = {"iterative": "-", "offline": "--"}


def _what_is_drawn(lines: dict[tuple[str, float, str], list[list[Line]]]) -> str:
    """What the chart holds: seeds of the fused path, lines of plain torch."""
    fused = [len(seeds) for (*_, way), seeds in lines.items() if way == "fused"]
    plain = [len(seeds) for (*_, way), seeds in lines.items() if way == "plain"]
    few, most = min(fused, default=0), max(fused, default=0)
    seeds = f"{most} seed{'s' if most > 1 else ''}" if few == most else f"{few} to {most} seeds"
    text = f"{sum(fused)} lines of the fused path: {seeds}"
    text += ", bars from lowest to highest" if most > 1 else ""
    return text + (f"; x: plain torch, {sum(plain)} lines" if plain else "")
