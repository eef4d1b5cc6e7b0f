"""Completions that were judged without a partner, and ranked lists of them.

    {"prompt": "...", "completion": "...", "label": true}             unpaired, as TRL has it (KTO)
    {"prompt": [messages], "completion": [messages], "label": false}  likewise, conversational
    {"messages": [messages], "label": true}                           likewise
    {"prompt": "...", "output": "...", "label": 1}                    HALOs' name of it
    {"prompt": "...", "completions": [...], "scores": [...]}          ranked; or `ranks`, 1 is best
    {"prompt": "...", "chosen": "...", "rejected": "..."}             a ranked list of two

A row of another kind is left out by name: preference pairs where single completions are wanted, and
the reverse. `system`, `tools`, `chat_template_kwargs` and `weight` are as in pairs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .completions import Completion, Ranking, completion_of
from .files import Source, read_rows
from .forms import ranked_texts
from .left_out import BadField, LeftOut
from .pairs import PairReader, all_of, unused_columns
from .row import Row, kind_of
from .turns import Turn, check_completion, for_template, number_of, turn_of, with_system

Judged = Completion | Ranking

_SHARED = {"prompt", "system", "tools", "chat_template_kwargs", "weight"}
_KNOWN = {
    "unpaired": _SHARED | {"completion", "output", "messages", "label"},
    "ranked": _SHARED
    | {"context", "completions", "responses", "scores", "rewards", "ranks", "chosen", "rejected"},
}


def kind_of_row(row: Row) -> str:
    """The kind that a row's columns say it is; ranked lists are pairs as well (best and worst)."""
    single = any(name in row for name in ("completion", "output", "messages"))
    return "unpaired" if single and "label" in row and "chosen" not in row else "pairs"


def peeked(
    source: Source, columns: Mapping[str, str] | None = None
) -> tuple[str, Iterator[tuple[str, Row | BadField]]]:
    """(the kind of the first row that can be read, all rows)."""
    rows = read_rows(source, columns)
    seen = []
    for where, row in rows:
        seen.append((where, row))
        if not isinstance(row, BadField):
            break
    kind = next((kind_of_row(row) for _, row in seen if not isinstance(row, BadField)), "pairs")
    return kind, itertools.chain(seen, rows)


class JudgedReader:
    """Rows to labelled completions or ranked lists; counts what it meets in them."""

    def __init__(
        self, kind: str, left_out: LeftOut, columns: Mapping[str, str] | None = None
    ) -> None:
        self.kind, self.left_out, self.columns = kind, left_out, columns
        self.unused: Counter[str] = Counter()
        self._pairs = PairReader(left_out, columns)

    def read(self, source: Source, given: Any = None) -> Iterator[Judged]:
        """The usable rows of a source, as they are read (`given`: read already)."""
        for where, row in read_rows(source, self.columns) if given is None else given:
            try:
                if isinstance(row, BadField):
                    raise row
                read = self._labelled if self.kind == "unpaired" else self._ranked
                found = read(row, where)
            except BadField as bad:
                self.left_out.add(bad.at(where))
                continue
            known = _KNOWN[self.kind]
            self.unused.update(k for k in row if k not in known and row[k] not in (None, "", []))
            yield found

    def remarks(self, source: Source) -> list[str]:
        """What there is to say of the columns, once the rows are read."""
        return unused_columns(source, self.unused)

    def _labelled(self, row: Row, where: str) -> Completion:
        if "chosen" in row or "rejected" in row:
            raise BadField(
                "chosen",
                "a preference pair",
                "one completion with a label (true: good, false: bad): kto and apo_zero_unpaired "
                "are losses of single completions",
                "paired data",
            )
        label = row.get("label")
        if isinstance(label, int) and label in (0, 1):  # a truth value is one
            label = bool(label)
        if not isinstance(label, bool):
            got = "missing" if label is None else repr(label)[:40]
            raise BadField("label", got, "true (good) or false (bad)", "no label")
        if "output" in row and "completion" not in row:
            row = {**row, "completion": row["output"]}
        if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), str):
            row = {**row, "completion": [{"role": "assistant", "content": row["completion"]}]}
        found = completion_of(row, where)
        weight = number_of(row, "weight")
        prompt, completion = found.prompt, found.completion
        return Completion(
            prompt, completion, where, found.tools, found.template_kwargs, label, weight
        )

    def _ranked(self, row: Row, where: str) -> Ranking:
        if "label" in row and "chosen" not in row and kind_of_row(row) == "unpaired":
            raise BadField(
                "completion",
                "one completion with a label",
                "a list `completions` with `scores` or `ranks`, or a pair",
                "unpaired data",
            )
        weight = number_of(row, "weight")
        if "chosen" in row or "rejected" in row or "output_1" in row or "output_A" in row:
            pair = self._pairs._parse(row, where)
            both = (pair.chosen, pair.rejected)
            return Ranking(pair.prompt, both, where, pair.tools, pair.template_kwargs, weight)
        texts, values, row = ranked_texts(dict(row))
        order = sorted(range(len(texts)), key=lambda i: -values[i])  # stable
        best = [i for at, i in enumerate(order) if not at or values[i] < values[order[at - 1]]]
        if len(best) < len(order):
            what = "completions with the score of another (the first of them is ranked)"
            self.left_out.notes[what] += len(order) - len(best)
        prompt = turn_of(row, "prompt")
        completions: list[Turn] = []
        for i in best:
            said = texts[i]
            if isinstance(prompt, list) and isinstance(said, str):
                said = [{"role": "assistant", "content": said}]
            turn = turn_of({"completions": said}, "completions")
            check_completion("completions", turn)
            if isinstance(turn, str) != isinstance(prompt, str):
                wanted = f"{kind_of(prompt)} as the prompt is"
                raise BadField("completions", kind_of(turn), wanted, "mis-typed field")
            completions.append(turn)
        prompt = with_system(row, prompt)
        given = for_template(row, prompt)
        return Ranking(prompt, tuple(completions), where, *given, weight)


def read_judged(
    source: Source, kind: str, left_out: LeftOut, columns: Mapping[str, str] | None = None
) -> list[Judged]:
    """All usable rows of a source, `kind` unpaired or ranked; the rest goes to `left_out`.

    Raises `DataError` if the source cannot be read, holds no usable row, or if a row is bad and
    `left_out.strict`.
    """
    what = "completion with a label" if kind == "unpaired" else "ranked list"
    return all_of(JudgedReader(kind, left_out, columns), source, what)
