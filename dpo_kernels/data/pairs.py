"""Reading preference pairs from JSONL, one JSON object a line.

Accepted forms, as TRL's:

    {"prompt": "...", "chosen": "...", "rejected": "..."}             plain, explicit prompt
    {"chosen": "...", "rejected": "..."}                              plain, implicit prompt
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}    conversational
    {"chosen": [messages], "rejected": [messages]}                    conversational, implicit

where a message is {"role": "...", "content": "..."}. An implicit prompt is what chosen and rejected
share at their start. UltraFeedback's rows (a text `prompt` repeated as the first user message of
both lists) are read as implicit ones.

A row that cannot be used is never dropped in silence: it becomes a `Problem` that says where, which
field, what came and what was expected. `LeftOut` reports each once, counts them by reason, or
refuses the first one (`strict`).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, str]
Turn = str | list[Message]


class DataError(ValueError):
    """The data cannot be used as asked; the message names file, line and field."""


@dataclass(frozen=True)
class Problem:
    """Why one row was left out."""

    where: str  # "file:line"
    field: str
    got: str
    expected: str
    reason: str  # the heading it is counted under

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.got}, expected {self.expected}"


@dataclass
class LeftOut:
    """Collects problems: reports each once, counts them by reason, refuses the first if strict."""

    strict: bool = False
    report: Callable[[str], None] | None = None
    problems: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Record one row as left out; raises `DataError` if strict."""
        if self.strict:
            raise DataError(f"{problem} (--strict refuses bad rows)")
        self.problems.append(problem)
        if self.report is not None:
            self.report(f"left out: {problem}")

    def counts(self) -> dict[str, int]:
        """Rows left out by reason, most frequent first."""
        return dict(Counter(p.reason for p in self.problems).most_common())

    def summary(self) -> str:
        """One line for the end of a run."""
        if not self.problems:
            return "left out: nothing"
        parts = ", ".join(f"{n} {reason}" for reason, n in self.counts().items())
        return f"left out: {len(self.problems)} ({parts})"


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with a preferred and a dispreferred completion; texts or message lists alike."""

    prompt: Turn
    chosen: Turn
    rejected: Turn
    source: str  # "file:line"
    offset: float | None = None  # the row's `margin`, for ODPO

    @property
    def conversational(self) -> bool:
        return isinstance(self.chosen, list)


class _BadField(Exception):
    """Raised while reading one row; turned into a `Problem` with file and line."""

    def __init__(self, name: str, got: str, expected: str, reason: str) -> None:
        super().__init__(name)
        self.name, self.got, self.expected, self.reason = name, got, expected, reason


def read_pairs(path: str | os.PathLike[str], left_out: LeftOut) -> list[PreferencePair]:
    """All usable pairs of a JSONL file; the rest goes to `left_out`.

    Raises `DataError` if the file cannot be opened, holds no usable pair, or if a row is bad and
    `left_out.strict`.
    """
    pairs = list(_read(path, left_out, _pair))
    if not pairs:
        raise DataError(f"{path}: no usable preference pair; {left_out.summary()}")
    return pairs


def read_conversations(
    path: str | os.PathLike[str], left_out: LeftOut
) -> list[tuple[str, list[Message]]]:
    """(source, messages) of each row {"messages": [...]} that ends with the assistant (for SFT)."""
    rows = list(_read(path, left_out, _conversation))
    if not rows:
        raise DataError(f"{path}: no usable conversation; {left_out.summary()}")
    return rows


def _read(
    path: str | os.PathLike[str], left_out: LeftOut, parse: Callable[[dict[str, Any], str], Any]
) -> Iterator[Any]:
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}, expected a JSONL file (one JSON object a line)")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield parse(_json_object(raw), where)
            except _BadField as bad:
                left_out.add(Problem(where, bad.name, bad.got, bad.expected, bad.reason))


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        detail = (
            f"invalid JSON ({error})"
            if isinstance(error, json.JSONDecodeError)
            else (f"undecodable line ({error})")
        )
        raise _BadField("line", detail, "one JSON object", "broken JSON") from None
    if not isinstance(row, dict):
        raise _BadField("line", _kind(row), "one JSON object", "broken JSON")
    return row


def _pair(row: dict[str, Any], where: str) -> PreferencePair:
    chosen, rejected = _turn(row, "chosen"), _turn(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _BadField("rejected", _kind(rejected), f"{_kind(chosen)} as chosen is",
                        "mis-typed field")  # fmt: skip
    if chosen == rejected:
        raise _BadField("rejected", "the same as chosen", "a different completion",
                        "chosen equals rejected")  # fmt: skip
    prompt: Turn | None = None
    if row.get("prompt") is not None:
        prompt = _turn(row, "prompt")
        if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
            if not all(side[0]["content"] == prompt for side in (chosen, rejected)):
                raise _BadField("prompt", "a text", "a message list as chosen is",
                                "mis-typed field")  # fmt: skip
            prompt = None  # UltraFeedback: the lists repeat the prompt, so it is implicit
        elif isinstance(prompt, list) and isinstance(chosen, str):
            raise _BadField("prompt", "a message list", "a text as chosen is", "mis-typed field")
    if prompt is None:
        prompt, chosen, rejected = _split_implicit(chosen, rejected)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        _check_completion(name, side)
    return PreferencePair(prompt, chosen, rejected, where, _margin(row))


def _conversation(row: dict[str, Any], where: str) -> tuple[str, list[Message]]:
    messages = _turn(row, "messages")
    if isinstance(messages, str):
        raise _BadField("messages", "a text", "a message list", "mis-typed field")
    _check_completion("messages", messages)
    return where, messages


def _turn(row: dict[str, Any], name: str) -> Turn:
    """A field that is a text or a list of messages."""
    if name not in row or row[name] is None:
        raise _BadField(name, "missing", "a text or a list of messages", "missing field")
    value = row[name]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _BadField(name, _kind(value), "a text or a list of messages", "mis-typed field")
    if not value:
        what = "empty prompt" if name == "prompt" else "empty completion"
        raise _BadField(name, "an empty list", "at least one message", what)
    for i, message in enumerate(value):
        for key in ("role", "content"):
            if not isinstance(message, dict):
                raise _BadField(f"{name}[{i}]", _kind(message), "a message", "mis-typed field")
            if not isinstance(message.get(key), str):
                got = _kind(message[key]) if key in message else "missing"
                raise _BadField(f"{name}[{i}].{key}", got, "a text", "mis-typed field")
    return value


def _split_implicit(chosen: Turn, rejected: Turn) -> tuple[Turn, Turn, Turn]:
    """Prompt, chosen, rejected: the common start is the prompt."""
    n = 0
    limit = min(len(chosen), len(rejected))
    if isinstance(chosen, list):
        limit -= 1  # a completion keeps at least its last message
    while n < limit and chosen[n] == rejected[n]:
        n += 1
    if isinstance(chosen, str) and n and chosen[n - 1] == " ":
        n -= 1  # the space belongs to the first word of the completion, as in TRL
    if n == 0:
        raise _BadField("prompt", "missing, and chosen and rejected share no start",
                        "a prompt, or a shared start", "missing field")  # fmt: skip
    return chosen[:n], chosen[n:], rejected[n:]


def _check_completion(name: str, side: Turn) -> None:
    if isinstance(side, str):
        if not side.strip():
            raise _BadField(name, "empty", "a completion", "empty completion")
        return
    if not side[-1]["content"].strip():
        raise _BadField(name, "empty", "a completion", "empty completion")
    if side[-1]["role"] != "assistant":
        raise _BadField(f"{name}[-1].role", repr(side[-1]["role"]), "'assistant'",
                        "last role not assistant")  # fmt: skip


def _margin(row: dict[str, Any]) -> float | None:
    value = row.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _BadField("margin", _kind(value), "a number", "mis-typed field")
    return float(value)


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number",
             str: "a text", list: "a list", dict: "an object"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
