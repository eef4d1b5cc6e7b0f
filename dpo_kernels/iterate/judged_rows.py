"""`pairs --format unpaired | ranked`: rows of single completions with a label, and ranked lists.

The score of a sample is its mean margin over the verdicts on it, as `best_worst` has it. Unpaired:
a score above 0 is good, one below is bad, one of 0 is neither. Ranked: a prompt's samples from the
highest score to the lowest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..data.left_out import DataError
from ..train.config_files import UserError
from .pair_rules import (
    PairCounts,
    by_id,
    conversations,
    judged_pair,
    log_length_ratio,
    make_pairs,
    matched,
    mixed,
)
from .records import Sample, as_completion, by_prompt, read_table
from .settings import PairOptions

Row = dict[str, Any]


def make_rows(
    kind: str,
    samples: Sequence[Sample],
    verdicts: Sequence[Row],
    options: PairOptions,
    seed: int = 42,
) -> tuple[list[Row], PairCounts]:
    """(rows, counts): pairs, unpaired completions or ranked lists of the samples."""
    if kind == "pairs":
        return make_pairs(samples, verdicts, options, seed)
    dropped: Counter[str] = Counter()
    scored = _scores(samples, verdicts, options, dropped)
    made = (
        _labelled(scored, options, dropped)
        if kind == "unpaired"
        else _ranked(scored, options, dropped)
    )
    if options.keep_fraction < 1 and made:
        n = max(1, round(options.keep_fraction * len(made)))
        best = sorted(range(len(made)), key=lambda i: -made[i][0])[:n]  # stable
        dropped["beyond keep_fraction"] += len(made) - n
        made = [made[i] for i in sorted(best)]
    rows = [row for _, row, _ in made]
    sources = {"judged": len(rows)}
    more = (
        mixed(options, by_prompt(samples), len(rows), seed, _labels_of, _good_answers)
        if kind == "unpaired"
        else mixed(options, by_prompt(samples), len(rows), seed, _lists_of, _no_ranking)
    )
    for name, found in more:
        sources[name] = len(found)
        rows += found
    ratio = log_length_ratio([texts for _, _, texts in made if texts is not None])
    left = {k: n for k, n in dropped.items() if n}
    what = "labelled completions" if kind == "unpaired" else "ranked lists"
    return rows, PairCounts(len(rows), sources, left, ratio, what)


def _scores(
    samples: Sequence[Sample],
    verdicts: Sequence[Row],
    options: PairOptions,
    dropped: Counter[str],
) -> list[list[tuple[float, Sample]]]:
    """Of each prompt its judged samples with their scores, the best first."""
    groups = by_prompt(samples)
    found = []
    for key, rows in by_id(verdicts).items():
        if key not in groups:
            raise DataError(f"a verdict is about the prompt {key}, of which there is no sample")
        number = {s.sample: s for s in groups[key]}
        sums: dict[int, list[float]] = {}
        for row in rows:
            j = judged_pair(row, number, options, dropped)
            if j is None:
                continue
            if options.length_matched is not None and not matched(j, options.length_matched):
                dropped["lengths too different"] += 1
                continue
            sums.setdefault(j.chosen.sample, []).append(j.margin)
            sums.setdefault(j.rejected.sample, []).append(-j.margin)
        each = [(sum(v) / len(v), number[n]) for n, v in sums.items()]
        full = [(score, s) for score, s in each if s.completion.strip()]
        dropped["empty completions"] += len(each) - len(full)
        found.append(sorted(full, key=lambda x: (-x[0], x[1].sample)))
    return found


Made = tuple[float, Row, tuple[str, str] | None]  # how sure, the row, (better, worse) text


def _labelled(
    scored: Sequence[list[tuple[float, Sample]]], options: PairOptions, dropped: Counter[str]
) -> list[Made]:
    made: list[Made] = []
    for each in scored:
        if options.select == "best_worst" and len(each) > 2:
            each = [each[0], each[-1]]
        texts = (each[0][1].completion, each[-1][1].completion) if len(each) > 1 else None
        for score, s in each:
            if score == 0:
                dropped["ties"] += 1
            elif abs(score) < options.min_margin:
                dropped["below min_margin"] += 1
            else:
                made.append((abs(score), _row(s, score > 0), texts))
                texts = None  # once a prompt
    return made


def _row(sample: Sample, good: bool) -> Row:
    completion = as_completion(sample.prompt, sample.completion)
    return {"prompt": sample.prompt, "completion": completion, "label": good}


def _ranked(
    scored: Sequence[list[tuple[float, Sample]]], options: PairOptions, dropped: Counter[str]
) -> list[Made]:
    made: list[Made] = []
    for each in scored:
        spread = each[0][0] - each[-1][0] if each else 0.0
        if not spread:
            dropped["ties"] += 1
        elif spread < options.min_margin:
            dropped["below min_margin"] += 1
        else:
            prompt = each[0][1].prompt
            row = {
                "prompt": prompt,
                "completions": [as_completion(prompt, s.completion) for _, s in each],
                "scores": [round(score, 9) for score, _ in each],
            }
            made.append((spread, row, (each[0][1].completion, each[-1][1].completion)))
    return made


def _of_file(path: str, groups: dict[str, list[Sample]], names: Sequence[str]) -> list[Row]:
    """These columns of a file's rows, each of which has them."""
    rows = read_table(path)
    for n, row in enumerate(rows, start=1):
        if any(row.get(name) is None for name in names):
            raise DataError(f"{path}: row {n}: expected {', '.join(names[:-1])} and {names[-1]}")
    return [{name: row[name] for name in names} for row in rows]


_labels_of = partial(_of_file, names=("prompt", "completion", "label"))
_lists_of = partial(_of_file, names=("prompt", "completions", "scores"))


def _good_answers(path: str, groups: dict[str, list[Sample]]) -> list[Row]:
    """The answers of SFT rows, which are good ones."""
    return [
        {"prompt": messages[:-1], "completion": messages[-1:], "label": True}
        for messages in conversations(path)
    ]


def _no_ranking(path: str, groups: dict[str, list[Sample]]) -> list[Row]:
    raise UserError("mix_sft: an SFT answer has no place in a ranked list; use mix")
