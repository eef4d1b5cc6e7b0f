"""Single completions: the rows of supervised fine-tuning, and of `dpo-kernels score`.

    {"messages": [messages]}                      conversational; every turn of the assistant scored
    {"prompt": "...", "completion": "..."}        texts or message lists alike
    {"text": "..."}                               every token scored

Those that were judged, alone (`label`) or in a ranked list, are read by `judged.py`.

A conversation ends with the assistant. `system`, `tools` and `chat_template_kwargs` are as in
pairs, and so is all of tokenisation: special tokens once, cut at `max_length`, what cannot be used
left out with file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .files import Source, name_of, read_rows
from .left_out import BadField, LeftOut, Problem, Refused
from .pairs import MEDIA, PairReader, PreferencePair
from .row import kind_of
from .sequences import Ids, Limits, Spans, TokenCompletion, TokenRanking, TokenRow, TokenSequence
from .tokenize import (
    ALL_TURNS,
    LONG,
    PairTokenizer,
    Progress,
    _between,
    _common,
    _require_template,
)
from .truncation import Truncation, shortened
from .turns import (
    Message,
    Turn,
    check_completion,
    encodable_text,
    for_template,
    turn_of,
    with_system,
)

_KNOWN = {"messages", "prompt", "completion", "text", "system", "tools", "chat_template_kwargs"}


@dataclass(frozen=True)
class Completion:
    """A prompt and one completion; texts or message lists alike."""

    prompt: Turn
    completion: Turn
    source: str  # "file:line"
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    label: bool | None = None  # found good or bad; None: nobody said
    weight: float | None = None  # of a judged one in the loss

    @property
    def conversational(self) -> bool:
        return isinstance(self.completion, list)


@dataclass(frozen=True)
class Ranking:
    """A prompt and its completions, from the best to the last; texts or message lists alike."""

    prompt: Turn
    completions: tuple[Turn, ...]
    source: str  # "file:line"
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    weight: float | None = None

    @property
    def conversational(self) -> bool:
        return isinstance(self.completions[0], list)


Scorable = Completion | PreferencePair


def read_conversations(
    path: Source, left_out: LeftOut, columns: Mapping[str, str] | None = None
) -> list[Completion]:
    """All usable completions of a file; the rest goes to `left_out`.

    `columns`: our name -> the name that the data has. Raises `DataError` if the file cannot be
    read, holds no usable row, or if a row is bad and `left_out.strict`.
    """
    since = len(left_out.problems)
    rows = [row for row in _read(path, left_out, False, columns) if isinstance(row, Completion)]
    if not rows:
        raise left_out.nothing(name_of(path), "no usable conversation", since)
    return rows


def read_scorable(path: Source, left_out: LeftOut) -> Iterator[Scorable]:
    """Pairs (rows with `chosen`) and completions of a file, as they come."""
    yield from _read(path, left_out, True)


def _read(
    path: Source,
    left_out: LeftOut,
    with_pairs: bool,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Scorable]:
    unused: Counter[str] = Counter()
    reader = PairReader(left_out)
    for where, row in read_rows(path, columns):
        single = isinstance(row, dict) and any(k in row for k in ("messages", "completion", "text"))
        if with_pairs and not single:
            pair = reader.pair(row, where)
            if pair is not None:
                yield pair
            continue
        try:
            if isinstance(row, BadField):
                raise row
            found = completion_of(row, where)
        except BadField as bad:
            left_out.add(bad.at(where))
            continue
        unused.update(k for k in row if k not in _KNOWN and row[k] not in (None, "", []))
        yield found
    if unused:
        names = ", ".join(f"{name} ({n} rows)" for name, n in unused.most_common())
        left_out.once(f"{name_of(path)}: columns that are not used: {names}")
    for remark in reader.remarks(path):
        left_out.once(remark)


def completion_of(row: dict[str, Any], where: str) -> Completion:
    """The completion of one row; `BadField` where it makes none."""
    for name in MEDIA:
        if row.get(name) not in (None, "", []):
            raise BadField(name, kind_of(row[name]), "text alone", "not supported")
    prompt: Turn
    completion: Turn
    if row.get("messages") is not None:
        name, turns = "messages", turn_of(row, "messages")
        if isinstance(turns, str):
            raise BadField(name, "a text", "a message list", "mis-typed field")
        said = (i for i, m in enumerate(turns) if m["role"] == "assistant" and i > 0)
        first = next(said, len(turns) - 1)  # an opening turn answers nothing: it is context
        check_completion("messages", turns)
        prompt, completion = turns[:first], turns[first:]
    elif row.get("completion") is not None:
        name, completion = "completion", turn_of(row, "completion")
        prompt = turn_of(row, "prompt")
        if isinstance(prompt, str) != isinstance(completion, str):
            wanted = f"{kind_of(prompt)} as the prompt is"
            raise BadField(name, kind_of(completion), wanted, "mis-typed field")
    elif isinstance(row.get("text"), str):
        name, prompt, completion = "text", "", encodable_text("text", row["text"])
    else:
        missing = "messages, or prompt and completion, or text"
        columns = ", ".join(row) or "no column"
        raise BadField("messages", f"missing (the row has {columns})", missing, "missing field")
    check_completion(name, completion)
    prompt = with_system(row, prompt)
    return Completion(prompt, completion, where, *for_template(row, prompt))


class RowTokenizer(PairTokenizer):
    """One tokenizer at work on pairs and completions; `None` for what goes to `left_out`."""

    def of(self, row: Scorable | Ranking) -> TokenRow | TokenSequence | None:
        if isinstance(row, PreferencePair):
            return self.usable(row)
        _require_template(self.tokenizer, row.conversational)
        notes = self.left_out.notes.copy()
        try:
            return self._ranking(row) if isinstance(row, Ranking) else self._completion(row)
        except Refused as refused:
            self.left_out.notes = notes  # they count what is in the rows that are used
            self.left_out.add(Problem(row.source, *refused.args))
            return None

    def _completion(self, row: Completion) -> TokenCompletion | TokenSequence:
        (sequence,) = self._sequences([row])
        if row.label is None:
            return sequence
        prompt, completion = sequence.ids[: sequence.start], sequence.ids[sequence.start :]
        how = (row.source, row.label, row.weight, sequence.unscored)
        return TokenCompletion(prompt, completion, *how)

    def _ranking(self, row: Ranking) -> TokenRanking:
        shared = (row.source, row.tools, row.template_kwargs)
        found = self._sequences([Completion(row.prompt, c, *shared) for c in row.completions])
        kept = {s.ids: s for s in reversed(found)}  # of equal ones the best
        if len(kept) < 2:
            wanted = "two that differ (within max_length)"
            raise Refused("completions", "the same tokens in all", wanted, "nothing to rank")
        if len(kept) < len(found):
            what = "completions that are another's tokens (the better place is kept)"
            self.left_out.notes[what] += len(found) - len(kept)
        ranked = [s for s in found if kept[s.ids] is s]
        start = ranked[0].start
        return TokenRanking(
            ranked[0].ids[:start],
            tuple(s.ids[start:] for s in ranked),
            row.source,
            row.weight,
            tuple(s.unscored for s in ranked),
        )

    def _sequences(self, rows: Sequence[Completion]) -> list[TokenSequence]:
        """The sequences of one prompt's completions, which keep one prompt."""
        names, alone, sides, spans = zip(*map(self._rendered, rows), strict=True)
        start = min(map(_common, alone, sides))
        kept, start, cut, _ = shortened(self.truncation, sides, start, spans, self.left_out.notes)
        found = []
        for row, name, ids, within in zip(rows, names, kept, cut, strict=True):
            unscored = () if within is None else _between(start, within, len(ids))
            sequence = TokenSequence(ids, start, row.source, unscored)
            if sequence.num_scored == 0:
                wanted = "at least one token of completion"
                raise Refused(name, "no token left to score", wanted, "completion too short")
            self._check_limits(name, ids)
            found.append(sequence)
        return found

    def _rendered(self, row: Completion) -> tuple[str, Ids, Ids, Spans | None]:
        """(what to call it, prompt, whole, scored spans where others speak in it)."""
        if row.conversational:
            return "completion", *self._conversation(row)
        name = "completion" if row.prompt else "text"
        self._words(name, str(row.completion))
        prompt = str(row.prompt)
        return name, self._plain(prompt, ""), self._plain(prompt, str(row.completion)), None

    def _conversation(self, row: Completion) -> tuple[Ids, Ids, Spans | None]:
        """(prompt, whole, the assistant's turns where others speak between them)."""
        # As the pair whose rejected side is empty: what a template is asked is the same.
        pair = PreferencePair(
            row.prompt,
            row.completion,
            [],
            row.source,
            tools=row.tools,
            template_kwargs=row.template_kwargs,
        )
        template = self._template(pair)
        self._check_read(pair, template)
        prompt, completion = (
            self._marked_once("completion", list(turns))  # type: ignore[arg-type]
            for turns in (row.prompt, row.completion)
        )

        def render(messages: list[Message], generation_prompt: bool) -> Ids:
            return self._render(messages, generation_prompt, pair)

        ids = render(prompt + completion, False)
        others = any(m["role"] != "assistant" for m in completion)
        if others and not self.truncation.assistant_only:
            self.left_out.notes[ALL_TURNS] += 1
        if not others or not self.truncation.assistant_only:
            return (render(prompt, True) if prompt else ()), ids, None
        try:
            spans = self._spans("completion", prompt, completion, ids, render, template, pair)
            return (render(prompt, True) if prompt else ()), ids, spans
        except Refused:
            what = "conversations whose turns the template does not keep apart (the last is scored)"
            self.left_out.notes[what] += 1
            return render((prompt + completion)[:-1], True), ids, None


def tokenize_conversations(
    rows: Sequence[Scorable],
    tokenizer: Any,
    max_length: Truncation | int | None,
    left_out: LeftOut,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> list[TokenSequence]:
    """Token ids of completions; what cannot be used goes to `left_out`."""
    found = _tokenised(rows, tokenizer, max_length, left_out, limits, progress)
    return [sequence for sequence in found if isinstance(sequence, TokenSequence)]


def tokenize_judged(
    rows: Sequence[Completion | Ranking],
    tokenizer: Any,
    max_length: Truncation | int | None,
    left_out: LeftOut,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> list[TokenCompletion | TokenRanking]:
    """Token ids of labelled completions or ranked lists; what cannot be used goes to `left_out`."""
    found = _tokenised(rows, tokenizer, max_length, left_out, limits, progress)
    return [row for row in found if isinstance(row, TokenCompletion | TokenRanking)]


def _tokenised(
    rows: Sequence[Scorable | Ranking],
    tokenizer: Any,
    max_length: Truncation | int | None,
    left_out: LeftOut,
    limits: Limits | None,
    progress: Progress | None,
) -> Iterator[TokenRow | TokenSequence | None]:
    maker = RowTokenizer(tokenizer, max_length, left_out, left_out.once, limits or Limits())
    wrapped: Any = rows
    if progress is not None and len(rows) >= LONG:
        wrapped = progress(rows, "tokenising", len(rows), "rows")
    return map(maker.of, wrapped)
