"""Preference pairs from the rows of a file.

Accepted forms, as TRL's:

    {"prompt": "...", "chosen": "...", "rejected": "..."}             plain, explicit prompt
    {"chosen": "...", "rejected": "..."}                              plain, implicit prompt
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}    conversational
    {"chosen": [messages], "rejected": [messages]}                    conversational, implicit

where a message is {"role": "...", "content": "..."}. An implicit prompt is what chosen and rejected
share at their start. UltraFeedback's rows (a text `prompt` repeated as the first user message of
both lists) are read as implicit ones.

Other projects' forms are in `forms.py`. Beside the three: `margin` (odpo), `weight`, `beta`,
`label_smoothing` and `group` of the pair, and of conversations `system`, `tools` and
`chat_template_kwargs`. A column that means nothing here is named once; one that changes what the
model would see (pictures) is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .files import Source, name_of, read_rows
from .forms import as_pair
from .left_out import BadField, LeftOut, listed
from .row import NUMBERS, Row, kind_of
from .turns import (
    TEXT_ALONE,
    Message,
    Turn,
    check_completion,
    encodable_text,
    for_template,
    number_of,
    turn_of,
    with_system,
)

MEDIA = ("images", "image", "videos", "video", "audio", "audios", "pixel_values", "input_features")
# Columns under which others hand something to the template: it would be dropped unseen.
_ELSEWHERE = {
    "functions": "tools under the name 'tools'",
    "documents": "the documents' text in the prompt",
    "chosen_tools": "the same tools for both completions, under the name 'tools'",
    "rejected_tools": "the same tools for both completions, under the name 'tools'",
}
_KNOWN = {
    "prompt",
    "chosen",
    "rejected",
    "system",
    "tools",
    "chat_template_kwargs",
    "group",
    *MEDIA,
    *NUMBERS,
}


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with a preferred and a dispreferred completion; texts or message lists alike."""

    prompt: Turn
    chosen: Turn
    rejected: Turn
    source: str  # "file:line"
    offset: float | None = None  # the row's `margin`, for ODPO
    weight: float | None = None  # of the pair in the loss
    beta: float | None = None  # of the pair, in place of the run's
    tools: list[dict[str, Any]] | None = None  # handed to the chat template
    template_kwargs: dict[str, Any] | None = None
    label_smoothing: float | None = None  # of the pair, in place of the run's
    group: str | None = None  # its source or annotator, for losses that learn one offset a group

    @property
    def conversational(self) -> bool:
        return isinstance(self.chosen, list)


class PairReader:
    """Rows to pairs; counts what it meets in them."""

    def __init__(
        self,
        left_out: LeftOut,
        columns: Mapping[str, str] | None = None,
        soft_labels: bool = False,
    ) -> None:
        self.left_out, self.columns, self.soft_labels = left_out, columns, soft_labels
        self.unused: Counter[str] = Counter()  # columns that mean nothing here
        self.forms: Counter[str] = Counter()  # of other projects
        self.rows = 0

    def read(self, source: Source, given: Any = None) -> Iterator[PreferencePair]:
        """The usable pairs of a source, as they are read (`given`: read already)."""
        for where, row in read_rows(source, self.columns) if given is None else given:
            pair = self.pair(row, where)
            if pair is not None:
                yield pair

    def pair(self, row: Row | BadField, where: str) -> PreferencePair | None:
        """The pair of one row; None where it is left out."""
        self.rows += 1
        try:
            return self._parse(row, where)
        except BadField as bad:
            self.left_out.add(bad.at(where))
            return None

    def _parse(self, row: Row | BadField, where: str) -> PreferencePair:
        if isinstance(row, BadField):
            raise row
        row, form = as_pair(row)
        if self.soft_labels:
            row = _softened(row)
        unknown = [name for name in row if name not in _KNOWN and row[name] not in (None, "", [])]
        self.unused.update(unknown)
        pair = _pair(row, where, unknown, self.left_out)
        if form is not None:
            self.forms[form] += 1
        return pair

    def remarks(self, source: Source) -> list[str]:
        """What there is to say of the columns, once the rows are read."""
        said = unused_columns(source, self.unused)
        if self.forms:
            names = ", ".join(f"{form} ({n} rows)" for form, n in self.forms.most_common())
            said.append(f"{name_of(source)}: rows of other forms: {names}")
        return said


def unused_columns(source: Source, counts: Counter[str]) -> list[str]:
    names = listed(f"{name} ({n} rows)" for name, n in counts.most_common())
    return [f"{name_of(source)}: columns that are not used: {names}"] if counts else []


def read_pairs(
    source: Source,
    left_out: LeftOut,
    columns: Mapping[str, str] | None = None,
    soft_labels: bool = False,
) -> list[PreferencePair]:
    """All usable pairs of a source (`files.read_rows`); the rest goes to `left_out`.

    `columns`: our name -> the name that the data has; `soft_labels`: `p_chosen` of a row becomes
    its `label_smoothing`. Raises `DataError` if the source cannot be read, holds no usable pair, or
    if a row is bad and `left_out.strict`.
    """
    return all_of(PairReader(left_out, columns, soft_labels), source, "preference pair")


def all_of(reader: Any, source: Source, what: str) -> list[Any]:
    """The usable rows of a source; an error where there is none, else what was met is told."""
    left_out = reader.left_out
    since = len(left_out.problems)
    rows = list(reader.read(source))
    for remark in reader.remarks(source):
        left_out.once(remark)
    if not rows:
        raise left_out.nothing(name_of(source), f"no usable {what}", since)
    return rows


def _pair(row: dict[str, Any], where: str, unknown: list[str], left_out: LeftOut) -> PreferencePair:
    for name in MEDIA:
        if row.get(name) not in (None, "", []):
            raise BadField(name, kind_of(row[name]), TEXT_ALONE, "not supported")
    for name, wanted in _ELSEWHERE.items():
        if row.get(name) not in (None, "", [], {}, "[]"):
            raise BadField(
                name, f"{kind_of(row[name])}, which is not used", wanted, "not supported"
            )
    chosen, rejected = turn_of(row, "chosen"), turn_of(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadField(
            "rejected", kind_of(rejected), f"{kind_of(chosen)} as chosen is", "mis-typed field"
        )
    if chosen == rejected:
        raise BadField(
            "rejected", "the same as chosen", "a different completion", "chosen equals rejected"
        )
    prompt: Turn | None = None
    if row.get("prompt") is not None:
        prompt = turn_of(row, "prompt")
        if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
            if not all(_first_asked(side) == prompt for side in (chosen, rejected)):
                raise BadField("prompt", "a text", "a message list as chosen is", "mis-typed field")
            prompt = None  # UltraFeedback: the lists repeat the prompt, so it is implicit
        elif isinstance(prompt, list) and isinstance(chosen, str):
            raise BadField("prompt", "a message list", "a text as chosen is", "mis-typed field")
    if prompt is None:
        prompt, chosen, rejected = _split_implicit(chosen, rejected, row, unknown)
    elif isinstance(prompt, list):
        chosen, rejected = (_unrepeated(prompt, side, left_out) for side in (chosen, rejected))
    elif prompt and str(chosen).startswith(prompt) and str(rejected).startswith(prompt):
        left_out.notes[
            "rows in which both completions begin with the prompt's text again "
            "(trained as they stand)"
        ] += 1
    prompt = with_system(row, prompt)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        check_completion(name, side)
    margin, weight, beta, smoothing = (number_of(row, name) for name in NUMBERS)
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        where,
        margin,
        weight,
        beta,
        *for_template(row, prompt),
        smoothing,
        _group(row),
    )


def _first_asked(side: list[Message]) -> str | None:
    return next((m["content"] for m in side if m["role"] == "user"), None)


def _split_implicit(
    chosen: Turn, rejected: Turn, row: dict[str, Any], unknown: list[str]
) -> tuple[Turn, Turn, Turn]:
    """Prompt, chosen, rejected: the common start is the prompt."""
    n = 0
    limit = min(len(chosen), len(rejected))
    if isinstance(chosen, list):
        limit -= 1  # a completion keeps at least its last message
    while n < limit and chosen[n] == rejected[n]:
        n += 1
    if isinstance(chosen, str) and n and chosen[n - 1] == " ":
        n -= 1  # the space belongs to the first word of the completion, as in TRL
    # Of texts, a letter in common would pass for the prompt that has another name.
    suspects = [name for name in unknown if _may_be_a_prompt(name, row[name])]
    if suspects and (n == 0 or isinstance(chosen, str)):
        raise BadField(
            "prompt",
            f"missing, and the column {suspects[0]!r} is unknown",
            "a prompt under the name 'prompt' (rename the column, or take it out if it is none)",
            "missing field",
        )
    if n == 0:
        raise BadField(
            "prompt",
            "missing, and chosen and rejected share no start",
            "a prompt, or a shared start",
            "missing field",
        )
    return chosen[:n], chosen[n:], rejected[n:]


def _may_be_a_prompt(name: str, value: Any) -> bool:
    label = name in ("id", "source", "dataset", "model", "split") or name.endswith(
        ("_id", "_model")
    )
    return isinstance(value, str | list | dict) and not label


def _unrepeated(prompt: list[Message], side: Turn, left_out: LeftOut) -> Turn:
    """A completion without the end of the prompt, where it begins with it."""
    assert isinstance(side, list)
    for k in range(min(len(prompt), len(side) - 1), 0, -1):
        if prompt[-k:] == side[:k]:
            left_out.notes["completions that repeated the prompt (it is taken once)"] += 1
            return side[k:]
    return side


def _softened(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the probability that chosen is better as what the loss calls it."""
    if row.get("label_smoothing") is not None:
        raise BadField(
            "label_smoothing", "a value beside soft_labels", "p_chosen alone", "not supported"
        )
    p: Any = row.get("p_chosen")
    number = isinstance(p, int | float) and not isinstance(p, bool)
    if not number or not 0.5 <= p <= 1:
        got = "missing" if p is None else str(p)[:40]
        wanted = "a probability in [0.5, 1] (soft_labels)"
        raise BadField("p_chosen", got, wanted, "no probability")
    rest = {name: value for name, value in row.items() if name != "p_chosen"}
    return {**rest, "label_smoothing": 1.0 - p}


def _group(row: dict[str, Any]) -> str | None:
    value = row.get("group")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadField("group", kind_of(value), "a text or a whole number", "mis-typed field")
    return encodable_text("group", str(value))
