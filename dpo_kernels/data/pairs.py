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

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .files import Source, name_of, read_rows
from .forms import as_pair
from .left_out import BadField, DataError, LeftOut, Problem, listed
from .row import NUMBERS, Row, kind_of, number_wanted

__all__ = [
    "DataError",
    "LeftOut",
    "Message",
    "PairReader",
    "PreferencePair",
    "Problem",
    "Turn",
    "read_pairs",
]

Message = dict[str, Any]
Turn = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
_MEDIA = ("images", "image", "videos", "video", "audio", "audios", "pixel_values", "input_features")
_TEXT_ALONE = "text alone: pictures, films and sounds are not supported"
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
    *_MEDIA,
    *NUMBERS,
}
# What `apply_chat_template` is given by us: a row cannot say it otherwise.
_OURS = (
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
)


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
        said = []
        if self.unused:
            names = listed(f"{name} ({n} rows)" for name, n in self.unused.most_common())
            said.append(f"{name_of(source)}: columns that are not used: {names}")
        if self.forms:
            names = ", ".join(f"{form} ({n} rows)" for form, n in self.forms.most_common())
            said.append(f"{name_of(source)}: rows of other forms: {names}")
        return said


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
    since = len(left_out.problems)
    reader = PairReader(left_out, columns, soft_labels)
    pairs = list(reader.read(source))
    for remark in reader.remarks(source):
        left_out.once(remark)
    if not pairs:
        raise left_out.nothing(name_of(source), "no usable preference pair", since)
    return pairs


def _read(
    source: Source, left_out: LeftOut, parse: Callable[[dict[str, Any], str], Any]
) -> Iterator[Any]:
    for where, row in read_rows(source):
        try:
            if isinstance(row, BadField):
                raise row
            yield parse(row, where)
        except BadField as bad:
            left_out.add(bad.at(where))


def _pair(row: dict[str, Any], where: str, unknown: list[str], left_out: LeftOut) -> PreferencePair:
    for name in _MEDIA:
        if row.get(name) not in (None, "", []):
            raise BadField(name, kind_of(row[name]), _TEXT_ALONE, "not supported")
    for name, wanted in _ELSEWHERE.items():
        if row.get(name) not in (None, "", [], {}, "[]"):
            raise BadField(
                name, f"{kind_of(row[name])}, which is not used", wanted, "not supported"
            )
    chosen, rejected = _turn(row, "chosen"), _turn(row, "rejected")
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
        prompt = _turn(row, "prompt")
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
    prompt = _with_system(row, prompt)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        _check_completion(name, side)
    margin, weight, beta, smoothing = (_number(row, name) for name in NUMBERS)
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        where,
        margin,
        weight,
        beta,
        *_for_template(row, prompt),
        smoothing,
        _group(row),
    )


def _first_asked(side: list[Message]) -> str | None:
    return next((m["content"] for m in side if m["role"] == "user"), None)


def _turn(row: dict[str, Any], name: str) -> Turn:
    """A field that is a text or a list of messages."""
    if name not in row or row[name] is None:
        raise BadField(name, "missing", "a text or a list of messages", "missing field")
    value = row[name]
    if isinstance(value, str):
        if _packed_messages(value):
            raise BadField(
                name,
                "messages as JSON within a text",
                "the list itself",
                "mis-typed field",
            )
        return _text(name, value)
    if not isinstance(value, list):
        raise BadField(name, kind_of(value), "a text or a list of messages", "mis-typed field")
    if not value:
        what = "empty prompt" if name == "prompt" else "empty completion"
        raise BadField(name, "an empty list", "at least one message", what)
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def _packed_messages(text: str) -> bool:
    """Whether a text is a list of messages, written as JSON once more."""
    if not text.lstrip().startswith("[") or '"role"' not in text:
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _message(name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise BadField(name, kind_of(message), "a message", "mis-typed field")
    calls = message.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
        raise BadField(f"{name}.tool_calls", kind_of(calls), "a list of calls", "mis-typed field")
    if None in message.values():  # a key without a value is none, for a template as well
        message = {k: v for k, v in message.items() if v is not None or k in ("role", "content")}
    if calls and message.get("content") is None:
        message = {**message, "content": ""}  # a call needs no words; templates print None as text
    for key in ("role", "content"):
        if key == "content":
            _no_media(f"{name}.content", message.get(key))
        if not isinstance(message.get(key), str):
            got = kind_of(message[key]) if key in message else "missing"
            if key not in message and ("from" in message or "value" in message):
                got = "missing (the message has 'from' and 'value')"
            raise BadField(f"{name}.{key}", got, "a text", "mis-typed field")
    if message["role"] not in ROLES:
        raise BadField(
            f"{name}.role", repr(message["role"]), f"one of {', '.join(ROLES)}", "unknown role"
        )
    _text(f"{name}.content", message["content"])
    for key in message.keys() - {"role", "content"}:
        _encodable(f"{name}.{key}", message[key])
    return message


def _no_media(name: str, content: Any) -> None:
    """`BadField` for content in parts that has a picture, a film or a sound among them."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (None, "text"):
            raise BadField(name, f"a part of type {kind!r}", _TEXT_ALONE, "not supported")


def _text(name: str, text: str) -> str:
    """The text, if it is one: half of a surrogate pair has no encoding, and no token."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half a character ({text[error.start]!r} at {error.start})"
        raise BadField(name, found, "text that UTF-8 can hold", "lone surrogate") from None
    return text


def _encodable(name: str, value: Any) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise BadField(name, "lists within lists without end", "less", "mis-typed field") from None
    except (TypeError, ValueError) as error:  # a typed column's own kind
        raise BadField(name, str(error), "what JSON can hold", "mis-typed field") from None
    _text(name, text)


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


def _with_system(row: dict[str, Any], prompt: Turn) -> Turn:
    """The prompt with the column `system` as its first message."""
    system = row.get("system")
    if system in (None, ""):
        return prompt
    if not isinstance(system, str):
        raise BadField("system", kind_of(system), "a text", "mis-typed field")
    if isinstance(prompt, str):
        raise BadField(
            "system",
            "a text beside plain texts",
            "message lists, or the system's text in the prompt",
            "not supported",
        )
    message = {"role": "system", "content": _text("system", system)}
    if prompt and prompt[0]["role"] in ("system", "developer"):
        if prompt[0]["content"] == system:
            return prompt
        raise BadField(
            "system",
            "another text than the prompt's own system message",
            "one system message",
            "two system messages",
        )
    return [message, *prompt]


def _for_template(
    row: dict[str, Any], prompt: Turn
) -> tuple[list[dict[str, Any]] | None, dict[str, Any] | None]:
    """(tools, chat_template_kwargs) of a row; either may be written as JSON, as TRL has them."""
    found: list[Any] = []
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise BadField(
                    name, "a text that is no JSON", f"{kind_of(kind())}", "mis-typed field"
                ) from None
        if not value:
            found.append(None)
            continue
        if not isinstance(value, kind) or (
            kind is list and any(type(t) is not dict for t in value)
        ):
            wanted = "a list of objects" if kind is list else "an object"
            raise BadField(name, kind_of(value), wanted, "mis-typed field")
        if isinstance(prompt, str):
            raise BadField(
                name,
                "given beside plain texts",
                "message lists: only a chat template can use it",
                "not supported",
            )
        if kind is dict and (taken := [key for key in value if key in _OURS]):
            raise BadField(
                f"{name}.{taken[0]}",
                "set by the row",
                "a variable of the template",
                "not supported",
            )
        _encodable(name, value)
        found.append(value)
    return found[0], found[1]


def _check_completion(name: str, side: Turn) -> None:
    if isinstance(side, str):
        if not side.strip():
            raise BadField(name, "empty", "a completion", "empty completion")
        return
    if side[-1]["role"] != "assistant":
        raise BadField(
            f"{name}[-1].role", repr(side[-1]["role"]), "'assistant'", "last role not assistant"
        )
    if not side[-1]["content"].strip() and not side[-1].get("tool_calls"):
        raise BadField(name, "empty", "a completion", "empty completion")
    for message in side if name != "messages" else []:
        if message["role"] in ("system", "developer"):
            raise BadField(
                name,
                f"a {message['role']} message",
                "it in the prompt",
                "system message in a completion",
            )


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
    return _text("group", str(value))


def _number(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadField(name, kind_of(value), "a number", "mis-typed field")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if wanted := number_wanted(name, number):
        raise BadField(name, str(value)[:40], wanted, "number out of range")
    return number
