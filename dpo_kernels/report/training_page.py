"""The page of one training run, or of several side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .bars import Bar, bar_chart
from .charts import Chart, Series, line_chart
from .folders import TrainingRun
from .html_page import details, grid, page, prose, section, table, text, tiles
from .numbers_text import NONE, number, seconds, size
from .run_curves import (
    EVAL,
    HALVES,
    STEP,
    Panel,
    curves,
    is_number,
    kl_points,
    note_of_curves,
    panel_chart,
)


def training_page(runs: Sequence[TrainingRun]) -> str:
    """The page; the caller has read the runs."""
    title = (
        runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(r.name for r in runs)
    )
    lead = "".join(_lead(r, len(runs) > 1) for r in runs)
    sections = [
        section("Summary", *([_summary(runs[0])] if len(runs) == 1 else [_final_numbers(runs)])),
        section("Curves", curves(runs), note=note_of_curves(runs)),
        section("Calibration", *_calibration(runs), note=_CALIBRATION),
        section("Data groups", *map(_groups, runs)),
        section("Samples before and after", *(_named(r, runs, _samples(r)) for r in runs)),
        section(
            "Most surprising pairs",
            *(_named(r, runs, _surprising(r)) for r in runs),
            note="Held-out pairs on which the trained policy is most sure of the rejected "
            "completion: mistakes of the policy, or of the labels.",
        ),
        section("Data left out", *(_named(r, runs, _left_out(r)) for r in runs)),
        section("Supervised steps before the pairs", _sft_before(runs)),
        section("Configuration", _configuration(runs)),
    ]
    return page(f"dpo-kernels: {title}", lead, sections)


# --- what a run was ---


def loss_of(run: TrainingRun) -> str:
    """The loss in words."""
    if run.summary.get("loss"):
        return str(run.summary["loss"])
    if run.supervised:
        return "SFT"
    names = run.config.get("loss_type")
    return " + ".join(map(str, names)) if isinstance(names, list) else str(names or "unknown")


def _lead(run: TrainingRun, several: bool) -> str:
    name = f"<b>{text(run.name)}</b>: " if several else ""
    model = run.config.get("model_name_or_path") or "the embedded model"
    data = run.config.get("dataset_name") or "the embedded data"
    what = f"<p>{name}{text(loss_of(run))}; {text(model)} on {text(data)}</p>"
    remarks = _remarks(run)
    if several and remarks:
        remarks = [" ".join(t if t.endswith(".") else f"{t}." for t in remarks)]
    return what + "".join(f'<p class="warn">{name}{text(t)}</p>' for t in remarks)


def _remarks(run: TrainingRun) -> list[str]:
    """What a reader must know before the curves."""
    found = []
    if not run.rows:
        found.append("No step is logged yet: the run was cut off before, or is still loading.")
    elif not run.finished:
        found.append(
            f"This run has not ended: the last logged step is {run.last_step:,}. It is still at "
            "work, or was cut off; what follows is what it left."
        )
    broken = [r["step"] for r in run.rows if not math.isfinite(_value(r.get("loss"), 0.0))]
    if broken:
        found.append(f"The loss was not finite at step {broken[0]:,}.")
    skipped = run.summary.get("skipped_steps") or 0
    if skipped:
        found.append(f"{skipped:,} steps were left out: their loss or gradient was not finite.")
    before, after = _before_after(run)
    a, b = before.get("eval_loss"), after.get("eval_loss")
    if run.finished and is_number(a) and is_number(b) and b > a and number(a) != number(b):
        found.append(f"The held-out loss rose from {number(a)} to {number(b)}.")
    fell = [
        (before.get(f"eval_logps/{k}"), after.get(f"eval_logps/{k}"))
        for k in ("chosen", "rejected")
    ]
    if all(is_number(x) and is_number(y) and y < x and number(x) != number(y) for x, y in fell):
        found.append(
            "The log-probs of the chosen and of the rejected completions both fell: "
            f"{number(fell[0][0])} to {number(fell[0][1])} and {number(fell[1][0])} to "
            f"{number(fell[1][1])} nats a completion."
        )
    return found + run.notes


def _value(value: Any, otherwise: float) -> float:
    return float(value) if is_number(value) else otherwise


def _before_after(run: TrainingRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out figures: of the summary, else of the first and last evaluation so far."""
    held = [r for r in run.rows if any(k.startswith(EVAL) for k in r)]
    before = run.summary.get("before") or (held[0] if held and held[0]["step"] == 0 else {})
    after = run.summary.get("after") or (held[-1] if len(held) > 1 else {})
    return before, after


MEASURES = (
    ("held-out loss", "eval_loss"),
    ("held-out reward accuracy, a tie is a half", "eval_rewards/accuracies" + HALVES),
    ("held-out reward margin (nats)", "eval_rewards/margins"),
    ("held-out log-prob of the chosen (nats)", "eval_logps/chosen"),
    ("held-out log-prob of the rejected (nats)", "eval_logps/rejected"),
    ("held-out log-prob accuracy", "eval_logps/accuracies"),
    ("KL estimate (nats a completion)", "kl"),
    ("held-out SFT loss (nats per token)", "eval_sft_loss"),
)


def _figures(run: TrainingRun) -> list[tuple[str, str]]:
    """(name, value) of what has no before and after."""
    calibration = run.summary.get("calibration") or {}
    times = sorted(y for _, y in run.points("step_time") if math.isfinite(y))
    tokens = sorted(y for _, y in run.points("tokens_per_s") if math.isfinite(y))
    left = run.summary.get("left_out")
    rows_out = sum(left.values()) if isinstance(left, dict) else len(run.left_out)
    found = [
        ("state", "finished" if run.finished else "not ended"),
        ("steps", number(run.summary.get("steps", run.last_step))),
        ("pairs", number(run.summary.get("pairs"))),
        ("rows", number(run.summary.get("rows"))),
        (
            "held-out pairs",
            number(run.summary.get("held_out_pairs", run.summary.get("held_out_rows"))),
        ),
        ("training loss, last", number(run.last("loss"))),
        ("calibration error (ECE)", number(calibration.get("ece_before"), 3)),
        ("best temperature", number(calibration.get("temperature"), 3)),
        ("step time, median", seconds(times[len(times) // 2]) if times else NONE),
        ("tokens per second, median", number(tokens[len(tokens) // 2], 3) if tokens else NONE),
        ("peak memory", size(run.summary.get("peak_memory_bytes"))),
        ("whole run", seconds(run.summary.get("seconds"))),
        ("rows left out", number(rows_out)),
        ("backend", str(run.summary.get("backend") or NONE)),
        ("version", str(run.summary.get("version") or NONE)),
    ]
    return [(k, v) for k, v in found if v != NONE]


def _measures(run: TrainingRun) -> list[tuple[str, float | None, float | None]]:
    before, after = _before_after(run)
    found = []
    for name, key in MEASURES:
        if key == "kl":
            points = kl_points(run, EVAL)
            first = points[0][1] if points and points[0][0] == 0 else None
            pair = first, points[-1][1] if points and points[-1][0] > 0 else None
        else:
            pair = before.get(key), after.get(key)
        if any(is_number(v) for v in pair):
            found.append((name, *pair))
    return found


def _summary(run: TrainingRun) -> str:
    rows = [
        (
            text(name),
            number(a),
            number(b),
            _change(a, b),
        )
        for name, a, b in _measures(run)
    ]
    return tiles(_figures(run)) + table(("", "before", "after", "change"), rows)


def _change(a: Any, b: Any) -> str:
    if not (is_number(a) and is_number(b) and math.isfinite(a) and math.isfinite(b)):
        return NONE
    return ("+" if b > a else "") + number(b - a, 3)


def _final_numbers(runs: Sequence[TrainingRun]) -> str:
    """A column for each run; a row, where there are many."""
    lines: dict[str, dict[str, str]] = {"loss is": {r.name: loss_of(r) for r in runs}}
    for run in runs:
        for name, a, b in _measures(run):
            lines.setdefault(name, {})[run.name] = f"{number(a)} → {number(b)}"
    for run in runs:
        for name, value in _figures(run):
            lines.setdefault(name, {})[run.name] = value
    whole = [["", *(r.name for r in runs)]]
    whole += [[name, *(found.get(r.name, NONE) for r in runs)] for name, found in lines.items()]
    if len(runs) > 6:
        whole = [list(row) for row in zip(*whole, strict=True)]
    head, *rows = [[text(cell) for cell in row] for row in whole]
    return table(head, rows)


# --- the other parts ---

_CALIBRATION = (
    "The policy says that the chosen completion of a pair is the better one with probability "
    "s(margin). Of pairs on which it is as confident as a point's place on the x axis, the y axis "
    "has the share on which it is right: on the diagonal the two agree. A larger point stands for "
    "more pairs."
)


def _calibration(runs: Sequence[TrainingRun]) -> list[str]:
    charts, rows = [], []
    for run in runs:
        found = run.summary.get("calibration")
        if not isinstance(found, dict):
            continue
        series = []
        for i, (kind, label) in enumerate(
            (("before", "as it is"), ("after", "with the best temperature"))
        ):
            bins = [b for b in found.get(f"bins_{kind}") or [] if _is_bin(b)]
            total = sum(b["pairs"] for b in bins) or 1
            sizes = [2.0 + 6.0 * math.sqrt(b["pairs"] / total) for b in bins]
            points = [(b["confidence"], b["accuracy"]) for b in bins]
            series.append(Series(label, points, i, sizes=sizes, mark_all=True))
        name = "reliability" if len(runs) == 1 else f"reliability: {run.name}"
        charts.append(
            line_chart(
                Chart(
                    name,
                    "confidence of the policy (probability)",
                    "share of pairs it is right on (0 to 1)",
                    series,
                    limits=(0.0, 1.0),
                    limits_x=(0.45, 1.05),  # a point at an end stands within the frame
                    diagonal="confidence = share",
                    ends=False,
                )
            )
        )
        rows.append(
            [
                text(run.name),
                number(found.get("pairs")),
                number(found.get("temperature"), 3),
                *(number(found.get(k), 3) for k in ("ece_before", "ece_after")),
                *(number(found.get(k), 4) for k in ("nll_before", "nll_after")),
            ]
        )
    head = ("run", "pairs", "best temperature", "ECE", "with it", "NLL (nats)", "with it")
    return [grid(charts), table(head, rows)]


def _is_bin(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_number(value.get(k)) for k in ("pairs", "confidence", "accuracy")
    )


def _groups(run: TrainingRun, most: int = 30) -> str:
    """Learned offsets and temperatures: where they are, and how they got there."""
    names = dict.fromkeys(
        key.split("/", 1)[1].rsplit("/", 1)[0]
        for row in run.rows
        for key in row
        if key.startswith("groups/") and key.count("/") > 1
    )
    final = run.summary.get("groups")
    if not isinstance(final, dict):
        final = {
            n: {k: run.last(f"groups/{n}/{k}") for k in ("temperature", "offset")} for n in names
        }
    final = {n: v for n, v in final.items() if isinstance(v, dict)}
    if not final:
        return ""
    shown = sorted(final, key=lambda n: -abs(_value(final[n].get("offset"), 0.0)))[:most]
    charts = []
    for key, unit, given in (
        ("offset", "nats taken from the margin", (0.0, "none")),
        ("temperature", "factor of beta", (1.0, "one")),
    ):
        bars = [Bar(n, _value(final[n].get(key), math.nan), i) for i, n in enumerate(shown)]
        left = f", {most} farthest of {len(final)}" if len(final) > most else ""
        charts.append(bar_chart(f"{key} of a group{left}", unit, [("", bars)], given))
        some = shown[:8]
        charts.append(
            line_chart(
                Chart(
                    f"{key} over the steps" + (f", {len(some)} groups" if len(final) > 8 else ""),
                    STEP,
                    unit,
                    [Series(n, run.points(f"groups/{n}/{key}"), i) for i, n in enumerate(some)],
                    whole_x=True,
                    given=(given,),
                )
            )
        )
    return grid(charts)


def _named(run: TrainingRun, runs: Sequence[TrainingRun], body: str) -> str:
    return f"<h3>{text(run.name)}</h3>{body}" if body and len(runs) > 1 else body


def _samples(run: TrainingRun) -> str:
    found = run.summary.get("samples") or [run.summary.get("sample") or {}]
    cards = [
        _card(
            "prompt",
            s.get("prompt"),
            [("before training", s.get("before")), ("after training", s.get("after"))],
        )
        for s in found
        if isinstance(s, dict) and (s.get("before") or s.get("after"))
    ]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(head: str, prompt: Any, sides: Sequence[tuple[str, Any]], line: str = "") -> str:
    columns = "".join(
        f'<div><div class="label">{text(name)}</div>{prose(value)}</div>' for name, value in sides
    )
    return (
        f'<div class="card">{line}<div class="label">{text(head)}</div>{prose(prompt)}'
        f'<div class="sides">{columns}</div></div>'
    )


def _surprising(run: TrainingRun, most: int = 10) -> str:
    cards = []
    for row in run.surprising[:most]:
        line = (
            f'<div class="label nowrap">margin {number(row.get("margin"), 3)} nats, P(chosen) '
            f"{number(row.get('p_chosen'), 3)}</div>"
            f'<div class="label">{text(row.get("source", ""))}</div>'
        )
        cards.append(
            _card(
                "prompt",
                spoken(row.get("prompt")),
                [(side, spoken(row.get(side))) for side in ("chosen", "rejected")],
                line,
            )
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def spoken(value: Any) -> str:
    """A prompt or completion as text: of messages one a line, the role before it."""
    if isinstance(value, list):
        found = [m for m in value if isinstance(m, dict)]
        if len(found) == 1:
            return str(found[0].get("content", ""))
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in found)
    return "" if value is None else str(value)


def _left_out(run: TrainingRun, most: int = 50) -> str:
    counts = run.summary.get("left_out")
    if not isinstance(counts, dict):
        counts = Counter(str(r.get("reason")) for r in run.left_out)
    if not counts and not run.left_out:
        told = run.summary or (run.path / "left_out.jsonl").is_file()
        return "<p>No row was left out.</p>" if told else ""
    rows = [(text(reason), number(n)) for reason, n in sorted(counts.items(), key=lambda c: -c[1])]
    each = [
        [text(r.get(k, "")) for k in ("where", "field", "got", "expected")] for r in run.left_out
    ]
    more = f"<p>{len(each) - most:,} more are in left_out.jsonl.</p>" if len(each) > most else ""
    listed = (
        table(
            ("where", "field", "came", "expected"),
            each[:most],
            words=(0, 1, 2, 3),
            kind="plain facts",
        )
        + more
    )
    title = f"{min(len(each), most):,} of {len(each):,} rows"
    return table(("reason", "rows"), rows) + (details(title, listed) if each else "")


def _sft_before(runs: Sequence[TrainingRun]) -> str:
    series: list[Series] = []
    for run in runs:
        points = [
            (float(r["step"]), float(r["loss"])) for r in run.sft_rows if is_number(r.get("loss"))
        ]
        series.append(Series(run.name if len(runs) > 1 else "", points, len(series)))
    panel = Panel("SFT loss", "nats per token", ())
    return grid([panel_chart(panel, panel.title, series)]) if any(s.points for s in series) else ""


def _configuration(runs: Sequence[TrainingRun]) -> str:
    parts = []
    if len(runs) > 1:
        keys = dict.fromkeys(k for r in runs for k in r.config)
        rows = []
        for key in keys:
            values = [_option(r.config.get(key)) for r in runs]
            if len(set(values)) > 1 and key != "output_dir":
                rows.append([text(key), *values])
        head = ["differs", *(text(r.name) for r in runs)]
        parts.append(table(head, rows, kind="plain"))
    for run in runs:
        title = "config.yaml" if len(runs) == 1 else f"{run.name}: config.yaml"
        parts.append(
            details(title, f"<pre>{text(run.config_text)}</pre>") if run.config_text else ""
        )
    return "".join(parts)


def _option(value: Any) -> str:
    if isinstance(value, list):
        return text(", ".join(map(str, value)))
    return text("none" if value is None else value)
