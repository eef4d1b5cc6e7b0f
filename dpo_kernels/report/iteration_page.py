"""The page of an iteration, or of several: rounds, win rates, the judge, samples side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .charts import Chart, Series, line_chart
from .folders import IterationRun, Row, read_lines
from .html_page import details, grid, page, prose, section, table, text, tiles
from .numbers_text import NONE, number, seconds
from .run_curves import curves, is_number
from .training_page import spoken

ROUND = "round"
WINS = (("win_rate_round0", "over round 0"), ("win_rate_previous", "over the previous"))
MEASURES = (
    (
        "KL to the starting model",
        "nats a sequence",
        (("kl/exact", "exact"), ("kl/k1", "k1"), ("kl/k3", "k3")),
        0.0,
    ),
    ("length of a sample", "characters", (("length", "length"),), None),
    (
        "diversity and repetition",
        "share (0 to 1)",
        (("diversity", "distinct word pairs"), ("repetition", "repeated 4-grams")),
        None,
    ),
    (
        "log-probs moved by the round",
        "nats per token",
        (("logps_moved/chosen", "chosen"), ("logps_moved/rejected", "rejected")),
        None,
    ),
)
JUDGED = (
    ("verdicts", "verdicts"),
    ("ties", "ties"),
    ("errors", "errors"),
)


def iteration_page(runs: Sequence[IterationRun]) -> str:
    """The page; the caller has read the folders."""
    title = ", ".join(r.name for r in runs)
    kind = "iteration" if len(runs) == 1 else f"{len(runs)} iterations"
    lead = "".join(_lead(r, len(runs) > 1) for r in runs)
    return page(
        f"dpo-kernels: {kind} {title}",
        lead,
        [
            section("Summary", *(_summary(r, len(runs) > 1) for r in runs)),
            section("Curves over rounds", _curves(runs), note=_NOTE),
            section("Rounds", *(_rounds(r, len(runs) > 1) for r in runs)),
            section("The judge", *(_judge(r, len(runs) > 1) for r in runs)),
            section(
                "Held-out prompts, before and after",
                *(_samples(r, len(runs) > 1) for r in runs),
                note="Of each prompt the two samples nearest in length, as the judge saw them.",
            ),
            section("Training of each round", *(_training(r, len(runs) > 1) for r in runs)),
            section("Configuration", *(_configuration(r) for r in runs)),
        ],
    )


_NOTE = (
    "A win rate counts the prompts whose two samples are about as long; bars are 95 % intervals, "
    "a tie is one half. KL is measured on fresh samples of the new policy."
)


def _name(run: IterationRun, several: bool) -> str:
    return f"<h3>{text(run.name)}</h3>" if several else ""


def _lead(run: IterationRun, several: bool) -> str:
    name = f"<b>{text(run.name)}</b>: " if several else ""
    ended = run.summary.get("ended") or next(
        (r["ended"] for r in run.rounds if r.get("ended")), None
    )
    said = f"The loop ended: {ended}." if ended else ""
    warn = [] if ended else ["The loop has not ended: it is at work, or was cut off."]
    lines = [f"<p>{name}{text(said)}</p>" if said else ""]
    return "".join(lines + [f'<p class="warn">{name}{text(t)}</p>' for t in [*warn, *run.notes]])


def _stage(row: Row, name: str) -> Row:
    stages = row.get("stages")
    found = stages.get(name) if isinstance(stages, dict) else None
    return found if isinstance(found, dict) else {}


def _measures(row: Row) -> Row:
    found = _stage(row, "evaluate").get("measures")
    return found if isinstance(found, dict) else {}


def _win(row: Row, key: str) -> Row:
    found = _stage(row, "evaluate").get(key)
    return found if isinstance(found, dict) and is_number(found.get("rate")) else {}


def _rate(w: Row, apart: str = " ") -> str:
    if not w:
        return NONE
    return f"{w['rate']:.3f}{apart}[{number(w.get('low'), 3)}, {number(w.get('high'), 3)}]"


def _seconds_of(row: Row) -> float:
    stages = row.get("stages") or {}
    return sum(s.get("seconds") or 0.0 for s in stages.values() if isinstance(s, dict))


def _summary(run: IterationRun, several: bool) -> str:
    last = next((r for r in reversed(run.rounds) if _win(r, "win_rate_round0")), {})
    best = next((r for r in run.rounds if r["round"] == run.promoted), {})
    found = [
        ("rounds", number(len(run.rounds))),
        ("promoted", f"round {run.promoted}" if run.promoted else "none"),
        ("win rate over round 0, promoted", _rate(_win(best, "win_rate_round0"), "\n")),
        ("win rate over round 0, last", _rate(_win(last, "win_rate_round0"), "\n")),
        ("KL of the promoted (nats a sequence)", number(_measures(best).get("kl/exact"), 3)),
        ("time", seconds(sum(map(_seconds_of, [run.zero, *run.rounds])))),
    ]
    return _name(run, several) + tiles((k, v) for k, v in found if v != NONE)


def _curves(runs: Sequence[IterationRun]) -> str:
    several = len(runs) > 1
    charts: list[str] = []
    series: list[Series] = []
    for run in runs:
        for key, label in WINS:
            rows = [r for r in run.rounds if _win(r, key)]
            series.append(
                Series(
                    f"{run.name}: {label}" if several else label,
                    [(r["round"], _win(r, key)["rate"]) for r in rows],
                    len(series),
                    mark_all=True,
                    spread=[
                        tuple(_number(_win(r, key).get(end)) for end in ("low", "high"))  # type: ignore[misc]
                        for r in rows
                    ],
                )
            )
    charts.append(
        _chart("win rate", "share of prompts won (0 to 1)", series, (0.0, 1.0), (0.5, "even"))
    )
    for title, unit, keys, start in MEASURES:
        series = []
        for run in runs:
            for key, label in keys:
                points = [
                    (float(r["round"]), float(_measures(r)[key]))
                    for r in [run.zero, *run.rounds]
                    if r and is_number(_measures(r).get(key))
                ]
                if points and start is not None and points[0][0] > 0:
                    points.insert(0, (0.0, start))  # the starting model to itself
                name = f"{run.name}: {label}" if several else label
                series.append(Series(name, points, len(series), mark_all=True))
        charts.append(_chart(title, unit, series))
    for title, unit, stage, keys in (
        ("verdicts", "number in the round", "judge", JUDGED),
        ("pairs", "number in the round", "pairs", (("pairs", "pairs"),)),
    ):
        series = []
        for run in runs:
            for key, label in keys:
                points = [
                    (float(r["round"]), float(_stage(r, stage)[key]))
                    for r in run.rounds
                    if is_number(_stage(r, stage).get(key))
                ]
                name = f"{run.name}: {label}" if several else label
                series.append(Series(name, points, len(series), mark_all=True))
        charts.append(_chart(title, unit, series, counts=True))
    return grid(charts)


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def _chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    limits: tuple[float, float] | None = None,
    given: tuple[float, str] | None = None,
    counts: bool = False,
) -> str:
    return line_chart(
        Chart(
            title,
            ROUND,
            unit,
            [s for s in series if s.points],
            whole_x=True,
            whole_y=counts,
            limits=limits,
            given=(given,) if given else (),
        )
    )


def _rounds(run: IterationRun, several: bool) -> str:
    rows = []
    for r in run.rounds:
        measures = _measures(r)
        rows.append(
            [
                number(r["round"]),
                "yes" if r.get("promoted") else "no",
                *(_rate(_win(r, key)) for key, _ in WINS),
                number(measures.get("kl/exact"), 3),
                number(measures.get("length"), 3),
                number(_stage(r, "generate").get("samples")),
                number(_stage(r, "pairs").get("pairs")),
                number(_stage(r, "train").get("steps")),
                seconds(_seconds_of(r)),
                text(r.get("ended") or ""),
            ]
        )
    head = (
        "round",
        "promoted",
        "win rate over round 0",
        "over the previous",
        "KL (nats)",
        "length",
        "samples",
        "pairs",
        "steps",
        "time",
        "ended",
    )
    return _name(run, several) + table(head, rows, words=(0, 1, 10)) if rows else ""


def _judge(run: IterationRun, several: bool) -> str:
    rows, said = [], []
    for r in run.rounds:
        judged, pairs = _stage(r, "judge"), _stage(r, "pairs")
        if not judged:
            continue
        dropped = pairs.get("dropped")
        dropped = dropped if isinstance(dropped, dict) else {}
        first = judged.get("first_judge")  # another was asked in its place
        if isinstance(first, dict):
            replaced = [NONE, "too few pairs: the next was asked in its place", NONE]
            rows.append([number(r["round"]), *_verdicts(first), *replaced, _cost(first)])
        rows.append(
            [
                number(r["round"]),
                *_verdicts(judged),
                number(pairs.get("pairs")),
                text(", ".join(f"{n} {why}" for why, n in dropped.items()) or "nothing"),
                number(pairs.get("log_length_ratio"), 3),
                _cost(judged),
            ]
        )
        for one in (first, judged):
            if isinstance(one, dict) and one.get("first_error"):
                said.append(f"<p>Round {r['round']}, first error: {text(one['first_error'])}</p>")
    head = (
        "round",
        "judge",
        "verdicts",
        "ties",
        "errors",
        "pairs",
        "dropped",
        "log length ratio",
        "cost",
    )
    return _name(run, several) + table(head, rows, words=(0, 1, 6)) + "".join(said) if rows else ""


def _verdicts(judged: Row) -> list[str]:
    """Cells: the judge, its verdicts, ties, errors."""
    total = judged.get("verdicts") or 0
    return [
        text(judged.get("judge", NONE)),
        number(total),
        _share(judged.get("ties"), total),
        _share(judged.get("errors"), total),
    ]


def _cost(judged: Row) -> str:
    return number(judged.get("cost"), 3)


def _share(count: Any, total: Any) -> str:
    if not is_number(count):
        return NONE
    return number(count) + (f" ({100 * count / total:.1f} %)" if total else "")


def _samples(run: IterationRun, several: bool, most: int = 12) -> str:
    """Samples of round 0 and of the promoted policy (of the last one judged, if none is)."""
    wanted = sorted(run.rounds, key=lambda r: (r["round"] == run.promoted, r["round"]))
    for r in reversed(wanted):
        rows = read_lines(r["folder"] / "wins_round0.jsonl", [])
        if rows:
            break
    else:
        return ""
    cards = []
    for row in rows[:most]:
        verdict = (
            "error" if row.get("error") else "a tie" if row.get("tie") else _won(row.get("p_first"))
        )
        sides = ((f"round {r['round']}", row.get("new")), ("round 0", row.get("old")))
        columns = "".join(
            f'<div><div class="label">{text(name)}</div>{prose(value)}</div>'
            for name, value in reversed(sides)
        )
        cards.append(
            f'<div class="card"><div class="label">prompt</div>{prose(spoken(row.get("prompt")))}'
            f'<div class="sides">{columns}</div><div class="label">verdict: {text(verdict)}</div>'
            "</div>"
        )
    none = "" if r.get("promoted") else "<p>No round was promoted: this is the last one judged.</p>"
    return _name(run, several) + none + f'<div class="cards">{"".join(cards)}</div>'


def _won(p: Any) -> str:
    if not is_number(p):
        return NONE
    return f"P(the later round's is better) = {number(p, 3)}"


def _training(run: IterationRun, several: bool) -> str:
    body = curves(run.trained) if run.trained else ""
    return _name(run, several) + body if body else ""


def _configuration(run: IterationRun) -> str:
    rows = [
        (f"{text(part)}: {text(key)}", text(value))
        for part, values in run.config.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value not in (None, [], "")
    ]
    return details(
        f"{run.name}: config.json",
        table(("option", "value"), rows, words=(0, 1), kind="plain facts"),
    )
