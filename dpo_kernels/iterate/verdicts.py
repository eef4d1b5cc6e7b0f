"""`judge`: which samples of a prompt are compared, and what the judge says of them.

Verdicts appear in a journal as the judge gives them; a comparison that stands there is not asked
for again. A judge of this process is asked one comparison at a time, so being killed loses at most
the one it was at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..train.console import Console
from ..train.ranks import ALONE, Ranks
from .judges import Judge
from .records import (
    Journal,
    PairItem,
    Sample,
    Turn,
    Verdict,
    by_prompt,
    of_rank,
    write_table,
)


@dataclass(frozen=True)
class Comparison:
    """Two samples of one prompt."""

    id: str
    prompt: Turn
    first: Sample
    second: Sample

    @property
    def item(self) -> PairItem:
        return PairItem(self.prompt, self.first.completion, self.second.completion)


@dataclass(frozen=True)
class JudgeCounts:
    """Counts over verdicts; `same` are comparisons of equal texts, which nobody is asked about.

    `by_position`: ties because one position was preferred in both orders.
    """

    verdicts: int
    ties: int
    errors: int
    same: int
    first_error: str | None = None
    by_position: int = 0

    def describe(self) -> str:
        n = max(self.verdicts, 1)
        text = (
            f"{self.verdicts} verdicts: {self.ties} ties ({self.ties / n:.1%}), {self.errors} "
            f"errors ({self.errors / n:.1%})"
        )
        if self.by_position:
            text += f"; {self.by_position} of the ties name one position in both orders"
        if self.same:
            text += f"; {self.same} pairs of equal texts were not judged"
        if self.first_error:
            text += f"; the first error: {self.first_error}"
        if self.verdicts and self.ties == self.verdicts:
            text += "; the judge finds every pair a tie"
        elif self.verdicts and self.ties + self.errors == self.verdicts:
            text += "; the judge decides no pair"
        return text


def comparisons(samples: Sequence[Sample], how: str = "all") -> Iterator[Comparison]:
    """The comparisons of a file of samples; equal texts are left out."""
    for key, group in by_prompt(samples).items():
        group = sorted(group, key=lambda s: s.sample)
        pairs = (
            combinations(group, 2) if how == "all" else zip(group[::2], group[1::2], strict=False)
        )
        for first, second in pairs:
            if first.completion != second.completion:
                yield Comparison(key, first.prompt, first, second)


def verdict_row(c: Comparison, verdict: Verdict, judge: str) -> dict[str, Any]:
    return {
        "prompt": c.prompt,
        "first": c.first.sample,
        "second": c.second.sample,
        "p_first": verdict.p_first,
        "tie": verdict.tie,
        "error": verdict.error,
        "judge": judge,
        "order": verdict.order,
        "raw": verdict.raw,
        "id": c.id,
        "score_first": verdict.score_first,
        "score_second": verdict.score_second,
        "position": verdict.position,
    }


def judge_samples(
    samples: Sequence[Sample],
    judge: Judge,
    output: str | Path,
    how: str = "all",
    console: Console | None = None,
    ranks: Ranks = ALONE,
) -> JudgeCounts:
    """Write a verdict for each comparison; those that an earlier call got are kept.

    Of many `ranks` each asks about its part of the prompts, by a judge of its own; the first one
    writes.
    """
    output, console = Path(output), console or Console(quiet=True)
    todo = list(comparisons(samples, how))
    texts = [[c.id, c.first.sample, c.second.sample, *_texts(c)] for c in todo]
    with ranks.together():
        journal = Journal.of(output, [judge.identity, texts], ranks)
    try:
        with ranks.together():
            done = {(row["id"], row["first"], row["second"]) for row in journal.rows}
            mine = of_rank(ranks, (c.id for c in todo))
            left = [
                c
                for c in todo
                if c.id in mine and (c.id, c.first.sample, c.second.sample) not in done
            ]
            for start in console.progress(
                range(0, len(left), judge.batch), "judging", -(-len(left) // judge.batch), "batches"
            ):
                ranks.at("judging")
                group = left[start : start + judge.batch]
                verdicts = judge.compare([c.item for c in group])
                journal.add(
                    [verdict_row(c, v, judge.name) for c, v in zip(group, verdicts, strict=True)]
                )
            journal.close()
    finally:
        journal.close()

    def finish() -> JudgeCounts:
        place = {(c.id, c.first.sample, c.second.sample): i for i, c in enumerate(todo)}
        rows = sorted(journal.every_row(), key=lambda r: place[r["id"], r["first"], r["second"]])
        write_table(output, rows)
        journal.drop()
        return count_verdicts(rows, _same(samples, how))

    return ranks.first_does(finish)


def _texts(c: Comparison) -> tuple[str, str]:
    return c.first.completion, c.second.completion


def _same(samples: Sequence[Sample], how: str) -> int:
    each = [len(group) for group in by_prompt(samples).values()]
    every = sum(n * (n - 1) // 2 if how == "all" else n // 2 for n in each)
    return every - sum(1 for _ in comparisons(samples, how))


def count_verdicts(rows: Sequence[dict[str, Any]], same: int = 0) -> JudgeCounts:
    errors = [row["error"] for row in rows if row["error"]]
    ties = sum(bool(row["tie"]) for row in rows)
    position = sum(bool(row.get("position")) for row in rows)
    first = errors[0] if errors else None
    return JudgeCounts(len(rows), ties, len(errors), same, first, position)
