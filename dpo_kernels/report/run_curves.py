"""The curves of training runs: one, or several over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from .charts import Chart, Series, line_chart
from .folders import TrainingRun
from .html_page import grid

STEP = "optimizer step"
EVAL = "eval_"
HALVES = "_ties_half"  # accuracies of held-out pairs: a tie counts one half


@dataclass(frozen=True)
class Panel:
    """A chart of metrics: (key, what it is called) of training; held out is `eval_` + key."""

    title: str
    y: str
    keys: tuple[tuple[str, str], ...]
    limits: tuple[float, float] | None = None
    given: tuple[tuple[float, str], ...] = ()
    factor: float = 1.0


PANELS = (
    Panel("loss", "mean of a pair's loss (nats)", (("loss", ""),)),
    Panel("reward margin", "chosen − rejected reward (nats)", (("rewards/margins", ""),)),
    Panel(
        "reward accuracy",
        "share of pairs (0 to 1)",
        (("rewards/accuracies", ""),),
        (0.0, 1.0),
        ((0.5, "chance"),),
    ),
    Panel(
        "log-prob of a completion",
        "nats a completion",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
    ),
    Panel(
        "implicit reward",
        "beta × log-ratio (nats)",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
    ),
    Panel("gradient norm", "L2 norm before clipping", (("grad_norm", ""),)),
    Panel("throughput", "tokens per second", (("tokens_per_s", ""),)),
    Panel("pairs", "pairs per second", (("pairs_per_s", ""),)),
    Panel("step time", "seconds per optimizer step", (("step_time", ""),)),
    Panel("learning rate", "per optimizer step", (("learning_rate", ""),)),
    Panel("padding saved", "share of padded positions (0 to 1)", (("padding_saved", ""),)),
    Panel("peak memory", "GiB", (("mem/peak", ""),)),
    Panel("SFT rows beside the pairs", "nats per token", (("sft/loss", ""),)),
    Panel("held-out conversations", "nats per token", (("sft_loss", ""),)),
)
_PLAIN = {"step", "epoch", "num_tokens", "eval_runtime", "eval_logps/accuracies"}


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def note_of_curves(runs: Sequence[TrainingRun]) -> str:
    notes = ["Rewards are beta times the log-ratio to the reference; a nat is ln e."]
    if any(kl_points(r, p) for r in runs for p in ("", EVAL)):
        notes.append(
            "The KL estimate is the mean of log reference − log policy over the given completions, "
            "chosen and rejected: what the policy has moved away from them. They are not its own "
            "samples, so it can be below zero."
        )
    if any(run.points(EVAL + "rewards/accuracies" + HALVES) for run in runs):
        notes.append("In held-out accuracies a tie is one half, in training's it is a miss.")
    return " ".join(notes)


def kl_points(run: TrainingRun, prefix: str) -> list[tuple[float, float]]:
    """The mean log-ratio of the given completions, its sign turned."""
    beta = run.config.get("beta")
    usual = run.config.get("f_divergence_type", "reverse_kl") == "reverse_kl"
    if not is_number(beta) or not beta or not usual or run.config.get("reference_free"):
        return []
    chosen = dict(run.points(f"{prefix}rewards/chosen"))
    rejected = dict(run.points(f"{prefix}rewards/rejected"))
    return [(x, -(chosen[x] + rejected[x]) / (2 * beta)) for x in chosen if x in rejected]


def curves(runs: Sequence[TrainingRun]) -> str:
    charts = []
    for panel in PANELS:
        if panel.title == "loss":
            panel = replace(panel, y=_of_the_loss(runs))
        charts += _panel(panel, runs)
        if panel.title == "reward accuracy":
            charts += _kl_panel(runs)
    return grid([*charts, *_other_panels(runs)])


def _of_the_loss(runs: Sequence[TrainingRun]) -> str:
    """What the loss of these runs is a mean over."""
    of = {"a token's" if run.supervised else f"a {_row_of(run)}'s" for run in runs}
    return f"mean of {' or '.join(sorted(of))} loss (nats)"


def _row_of(run: TrainingRun) -> str:
    names = run.config.get("loss_type")
    kinds = {"kto": "completion", "apo_zero_unpaired": "completion", "plackett_luce": "list"}
    return kinds.get(str(names[0] if isinstance(names, list) and names else names), "pair")


def _panel(panel: Panel, runs: Sequence[TrainingRun]) -> list[str]:
    def held(key: str) -> str:
        return EVAL + key + (HALVES if key == "rewards/accuracies" else "")

    if len(runs) == 1:
        series: list[Series] = []
        for prefix, name in (("", "training"), (EVAL, "held out")):
            for key, what in panel.keys:
                points = runs[0].points(held(key) if prefix else key, panel.factor)
                label = ", ".join(w for w in (what, name) if w)
                style = len(series)
                series.append(Series(label, points, style, mark_all=bool(prefix)))
        return [panel_chart(panel, panel.title, series)]
    found = []
    for key, what in panel.keys:
        for prefix in ("", EVAL):
            series = [
                Series(
                    r.name,
                    r.points(held(key) if prefix else key, panel.factor),
                    i,
                    mark_all=bool(prefix),
                )
                for i, r in enumerate(runs)
            ]
            title = ", ".join(w for w in (panel.title, what, "held out" if prefix else "") if w)
            found.append(panel_chart(panel, title, series))
    return found


def panel_chart(panel: Panel, title: str, series: Sequence[Series]) -> str:
    return line_chart(
        Chart(
            title,
            STEP,
            panel.y,
            [s for s in series if s.points],
            whole_x=True,
            limits=panel.limits,
            given=panel.given,
        )
    )


def _kl_panel(runs: Sequence[TrainingRun]) -> list[str]:
    panel = Panel("KL estimate", "log reference − policy (nats a completion)", ())
    if len(runs) == 1:
        found = [
            Series(name, kl_points(runs[0], prefix), i, mark_all=bool(prefix))
            for i, (prefix, name) in enumerate((("", "training"), (EVAL, "held out")))
        ]
        return [panel_chart(panel, panel.title, found)]
    charts = []
    for prefix in ("", EVAL):
        series = [
            Series(r.name, kl_points(r, prefix), i, mark_all=bool(prefix))
            for i, r in enumerate(runs)
        ]
        charts.append(panel_chart(panel, panel.title + (", held out" if prefix else ""), series))
    return charts


def _other_panels(runs: Sequence[TrainingRun], most: int = 12) -> list[str]:
    """What else was logged: nothing that a run wrote is missing from its page."""
    known = {key for panel in PANELS for key, _ in panel.keys}
    known |= {EVAL + key for key in known} | {EVAL + key + HALVES for key in known} | _PLAIN
    keys = dict.fromkeys(
        key
        for run in runs
        for row in run.rows
        for key, value in row.items()
        if key not in known and is_number(value) and not key.startswith("groups/")
    )
    charts = []
    for key in [*keys][:most]:
        series = [
            Series(r.name if len(runs) > 1 else "", r.points(key), i) for i, r in enumerate(runs)
        ]
        charts.append(panel_chart(Panel(key, f"{key} as logged", ()), key, series))
    return charts
