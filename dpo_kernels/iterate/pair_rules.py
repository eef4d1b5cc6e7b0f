"""`pairs`: from samples and verdicts to rows that any trainer of preference pairs reads.

The margin of a pair is the difference of the two scores where the judge scores, else the log-odds
of the verdict, cut at `MOST_ODDS`. A row has `prompt`, `chosen`, `rejected`, `margin`, `p_chosen`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.left_out import DataError
from ..train.config_files import UserError
from .records import (
    Sample,
    as_completion,
    by_prompt,
    completion_text,
    is_number,
    prompt_id,
    read_table,
)
from .settings import PairOptions

MOST_ODDS = math.log(0.999 / 0.001)  # a label says 1 and means no more than that


@dataclass(frozen=True)
class JudgedPair:
    """A verdict on two samples, seen from the better one. `margin` 0 is a tie."""

    chosen: Sample
    rejected: Sample
    margin: float
    p: float


@dataclass(frozen=True)
class PairCounts:
    """Pairs, where they came from, and what became of the rest."""

    pairs: int
    sources: dict[str, int]
    dropped: dict[str, int]
    log_length_ratio: float  # mean log(length chosen / rejected) of the judged pairs
    rows: str = "pairs"  # what they are

    def describe(self) -> str:
        left = ", ".join(f"{n} {why}" for why, n in self.dropped.items()) or "nothing"
        found = ", ".join(f"{n} {name}" for name, n in self.sources.items())
        return (
            f"{self.pairs} {self.rows} ({found}); dropped: {left}; log length ratio of chosen to "
            f"rejected {self.log_length_ratio:+.3f}"
        )


def make_pairs(
    samples: Sequence[Sample],
    verdicts: Sequence[dict[str, Any]],
    options: PairOptions,
    seed: int = 42,
) -> tuple[list[dict[str, Any]], PairCounts]:
    """(rows, counts) of the pairs that the options ask for. A verdict with an error makes none."""
    groups = by_prompt(samples)
    dropped: Counter[str] = Counter()
    found: list[JudgedPair] = []
    for key, rows in by_id(verdicts).items():
        if key not in groups:
            raise DataError(f"a verdict is about the prompt {key}, of which there is no sample")
        number = {s.sample: s for s in groups[key]}
        judged = [j for row in rows if (j := judged_pair(row, number, options, dropped))]
        if options.length_matched is not None:
            near = [j for j in judged if matched(j, options.length_matched)]
            dropped["lengths too different"] += len(judged) - len(near)
            judged = near
        if options.select == "best_worst" and judged:
            judged = _best_worst(judged, dropped)
        found += judged
    kept = [j for j in found if _keep(j, options, dropped)]
    if options.keep_fraction < 1 and kept:
        n = max(1, round(options.keep_fraction * len(kept)))
        best = sorted(range(len(kept)), key=lambda i: -kept[i].margin)[:n]  # stable
        dropped["beyond keep_fraction"] += len(kept) - n
        kept = [kept[i] for i in sorted(best)]
    pairs = [_pair(j) for j in kept]
    sources = {"judged": len(pairs)}
    for name, rows in mixed(options, groups, len(pairs), seed, _static, _from_sft):
        sources[name] = len(rows)
        pairs += rows
    ratio = log_length_ratio([(j.chosen.completion, j.rejected.completion) for j in kept])
    counts = PairCounts(len(pairs), sources, {k: n for k, n in dropped.items() if n}, ratio)
    return pairs, counts


def by_id(verdicts: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in verdicts:
        found.setdefault(str(row.get("id") or prompt_id(row["prompt"])), []).append(row)
    return found


def judged_pair(
    row: dict[str, Any], number: dict[int, Sample], options: PairOptions, dropped: Counter[str]
) -> JudgedPair | None:
    """The verdict as a pair; None, counted, for an error."""
    if row.get("error") or row.get("p_first") is None:
        dropped["errors"] += 1
        return None
    try:
        first, second = number[row["first"]], number[row["second"]]
    except KeyError as missing:
        raise DataError(f"a verdict is about sample {missing}, which is not there") from None
    p, scores = float(row["p_first"]), (row.get("score_first"), row.get("score_second"))
    if not 0 <= p <= 1:
        raise DataError(f"p_first must be in [0, 1], got {p}")
    if row.get("tie"):
        return JudgedPair(first, second, 0.0, 0.5)
    if None not in scores:
        margin = float(scores[0]) - float(scores[1])  # type: ignore[arg-type]
    else:
        margin = _log_odds(p)
    if options.length_penalty:
        extra = len(first.completion) - len(second.completion)
        margin -= options.length_penalty * extra
        p = _sigmoid(margin) if None in scores or 0 < p < 1 else float(margin > 0)
    if margin < 0:
        return JudgedPair(second, first, -margin, 1 - p)
    return JudgedPair(first, second, margin, p if margin else 0.5)


def _log_odds(p: float) -> float:
    if p in (0.0, 1.0):
        return MOST_ODDS if p else -MOST_ODDS
    return max(-MOST_ODDS, min(MOST_ODDS, math.log(p) - math.log1p(-p)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, x))))


def matched(pair: JudgedPair, share: float) -> bool:
    lengths = sorted((len(pair.chosen.completion), len(pair.rejected.completion)))
    return lengths[1] <= (1 + share) * lengths[0]


def _best_worst(judged: list[JudgedPair], dropped: Counter[str]) -> list[JudgedPair]:
    """The pair of the sample with the highest mean margin and the one with the lowest.

    Only a verdict on just these two makes it a pair; one that says the opposite makes none.
    """
    sums: dict[int, list[float]] = {}
    for j in judged:
        sums.setdefault(j.chosen.sample, []).append(j.margin)
        sums.setdefault(j.rejected.sample, []).append(-j.margin)
    mean = {n: sum(v) / len(v) for n, v in sorted(sums.items())}
    direct = {(j.chosen.sample, j.rejected.sample): j for j in judged}
    # Of the judged pairs, the one whose samples lie furthest apart; a tie only if all are ties.
    best = max(
        judged, key=lambda j: (abs(mean[j.chosen.sample] - mean[j.rejected.sample]), j.margin > 0)
    )
    high, low = best.chosen.sample, best.rejected.sample
    if best.margin and mean[high] < mean[low]:
        dropped["contradicted by the other verdicts"] += 1
        return []
    return [direct[high, low]]


def _keep(pair: JudgedPair, options: PairOptions, dropped: Counter[str]) -> bool:
    if pair.margin == 0:
        dropped["ties"] += options.ties == "drop"
        return options.ties == "soft"
    if pair.margin < options.min_margin:
        dropped["below min_margin"] += 1
        return False
    if not pair.chosen.completion.strip() or not pair.rejected.completion.strip():
        dropped["empty completions"] += 1
        return False
    return True


def _pair(j: JudgedPair) -> dict[str, Any]:
    prompt = j.chosen.prompt
    return {
        "prompt": prompt,
        "chosen": as_completion(prompt, j.chosen.completion),
        "rejected": as_completion(prompt, j.rejected.completion),
        "margin": round(j.margin, 9),
        "p_chosen": round(j.p, 9),
    }


def log_length_ratio(kept: Sequence[tuple[str, str]]) -> float:
    """Mean log of the ratio of two texts' lengths."""
    ratios = [math.log(max(len(a), 1) / max(len(b), 1)) for a, b in kept]
    return sum(ratios) / len(ratios) if ratios else 0.0


Maker = Callable[[str, dict[str, list[Sample]]], list[dict[str, Any]]]


def mixed(
    options: PairOptions,
    groups: dict[str, list[Sample]],
    judged: int,
    seed: int,
    static: Maker,
    from_sft: Maker,
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of other files: WEIGHT rows for each judged pair, drawn by seed without repetition."""
    found = []
    for texts, make in ((options.mix, static), (options.mix_sft, from_sft)):
        for text in texts:
            path, equals, weight = text.rpartition("=")
            try:
                share = float(weight) if equals else math.nan
            except ValueError:
                share = math.nan
            if not 0 < share < math.inf:
                raise UserError(f"mix and mix_sft take FILE=WEIGHT, got {text!r}")
            rows = make(path, groups)
            wanted = min(round(share * judged), len(rows))
            picked = sorted(random.Random(f"{seed} {path}").sample(range(len(rows)), wanted))
            found.append((Path(path).name, [rows[i] for i in picked]))
    return found


def _static(path: str, groups: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    rows = []
    for n, row in enumerate(read_table(path), start=1):
        if row.get("prompt") is None or not row.get("chosen") or not row.get("rejected"):
            raise DataError(f"{path}: row {n}: expected prompt, chosen and rejected")
        numbers = {"margin": row.get("margin"), "p_chosen": row.get("p_chosen")}
        for name, value in numbers.items():
            if value is not None and not is_number(value):
                raise DataError(f"{path}: row {n}: {name}: expected a number, got {value!r}")
        rows.append(
            {
                **{k: row[k] for k in ("prompt", "chosen", "rejected")},
                "margin": float(numbers["margin"] or 0.0),
                "p_chosen": 1.0 if numbers["p_chosen"] is None else float(numbers["p_chosen"]),
            }
        )
    return rows


def conversations(path: str) -> list[list[dict[str, Any]]]:
    """The messages of SFT rows, the last of them the assistant's."""
    found: list[Any] = [row.get("messages") for row in read_table(path)]
    for n, messages in enumerate(found, start=1):
        if not isinstance(messages, list) or len(messages) < 2:
            raise DataError(f"{path}: row {n}: expected messages that end with the assistant's")
    return found


def _from_sft(path: str, groups: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    """The answer of an SFT row over the policy's first other sample of that prompt (2401.01335)."""
    asked = {prompt_id(group[0].prompt): group for group in groups.values()}
    rows = []
    for messages in conversations(path):
        prompt, answer = messages[:-1], completion_text(messages[-1:])
        samples = asked.get(prompt_id(prompt)) or asked.get(prompt_id(prompt[-1]["content"]))
        other = next((s for s in samples or () if s.completion not in (answer, "")), None)
        if other is None:
            continue  # its prompt was not sampled
        rows.append(
            {
                "prompt": other.prompt,
                "chosen": as_completion(other.prompt, answer),
                "rejected": as_completion(other.prompt, other.completion),
                "margin": 0.0,
                "p_chosen": 1.0,
            }
        )
    return rows
