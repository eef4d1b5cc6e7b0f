"""The win rate of one policy over another, on prompts that neither was trained on.

Of each prompt the two samples nearest in length are compared, so that a judge's taste for length
has as little to work with as the samples allow; the main number counts only the prompts whose two
texts differ in length by at most `match`. A tie is one half; errors are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.ranks import ALONE, Ranks
from .judge_eval import wilson
from .judges import Judge
from .records import Journal, PairItem, Sample, by_prompt, of_rank, write_table


def nearest_pairs(new: Sequence[Sample], old: Sequence[Sample]) -> list[tuple[str, Sample, Sample]]:
    """(prompt id, sample of the new, sample of the old policy), nearest in length."""
    others, found = by_prompt(old), []
    for key, group in by_prompt(new).items():
        if key in others:
            both = [(a, b) for a in group for b in others[key]]
            a, b = min(both, key=lambda p: (_gap(*p), p[0].sample, p[1].sample))
            found.append((key, a, b))
    return found


def _gap(a: Sample, b: Sample) -> float:
    return abs(math.log(max(len(a.completion), 1) / max(len(b.completion), 1)))


def win_rate(
    new: Sequence[Sample],
    old: Sequence[Sample],
    judge: Judge,
    output: Path,
    match: float = 0.2,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Judge, keep the verdicts in `output`, and count.

    Verdicts in its journal are kept. Equal texts are ties that nobody is asked about. Of many
    `ranks` each asks about its part of the prompts.
    """
    pairs = nearest_pairs(new, old)
    texts = [[key, a.completion, b.completion] for key, a, b in pairs]
    with ranks.together():
        journal = Journal.of(output, [judge.identity, texts], ranks)
    try:
        with ranks.together():
            done = {row["id"] for row in journal.rows}
            mine = of_rank(ranks, (p[0] for p in pairs))
            left = [p for p in pairs if p[0] in mine and p[0] not in done]
            for start in range(0, len(left), judge.batch):
                ranks.at("judging of held-out samples")
                group = left[start : start + judge.batch]
                asked = [p for p in group if p[1].completion != p[2].completion]
                items = [PairItem(a.prompt, a.completion, b.completion) for _, a, b in asked]
                verdicts = dict(zip((p[0] for p in asked), judge.compare(items), strict=True))
                journal.add([_row(*p, verdicts.get(p[0]), judge.name) for p in group])
            journal.close()
    finally:
        journal.close()

    def finish() -> dict[str, Any]:
        place = {key: i for i, (key, _, _) in enumerate(pairs)}
        rows = sorted(journal.every_row(), key=lambda r: place[r["id"]])
        write_table(output, rows)
        journal.drop()
        near = math.log(1 + match)
        matched = [row for row in rows if row["length_gap"] <= near]
        return {**count(matched), "every_prompt": count(rows), "length_match": match}

    return ranks.first_does(finish)


def _row(key: str, a: Sample, b: Sample, verdict: Any, judge: str) -> dict[str, Any]:
    same = verdict is None
    return {
        "id": key,
        "prompt": a.prompt,
        "new": a.completion,
        "old": b.completion,
        "p_first": 0.5 if same else verdict.p_first,
        "tie": same or verdict.tie,
        "error": None if same else verdict.error,
        "judge": judge,
        "raw": "" if same else verdict.raw,
        "length_gap": _gap(a, b),
    }


def count(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """wins, ties, losses, errors, the rate with its 95 % interval, and the length ratio."""
    read = [row for row in rows if row["error"] is None]
    ties = sum(row["tie"] for row in read)
    wins = sum(not row["tie"] and row["p_first"] > 0.5 for row in read)
    n = len(read)
    low, high = wilson(wins + ties / 2, n)
    ratios = [math.log(max(len(r["new"]), 1) / max(len(r["old"]), 1)) for r in read]
    return {
        "prompts": n,
        "wins": wins,
        "ties": ties,
        "losses": n - wins - ties,
        "errors": len(rows) - n,
        "rate": (wins + ties / 2) / n if n else None,
        "low": low,
        "high": high,
        "log_length_ratio": sum(ratios) / n if n else None,
    }
