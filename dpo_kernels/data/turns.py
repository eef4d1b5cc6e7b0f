"""What a field of a row holds: a text, or messages; what stands beside them for the template."""

from __future__ import annotations

import json
import math
from typing import Any

from .left_out import BadField
from .row import kind_of, number_wanted

Message = dict[str, Any]
Turn = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
TEXT_ALONE = "text alone: pictures, films and sounds are not supported"
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


def turn_of(row: dict[str, Any], name: str) -> Turn:
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
        return encodable_text(name, value)
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
    encodable_text(f"{name}.content", message["content"])
    for key in message.keys() - {"role", "content"}:
        _encodable(f"{name}.{key}", message[key])
    return message


def _no_media(name: str, content: Any) -> None:
    """`BadField` for content in parts that has a picture, a film or a sound among them."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (None, "text"):
            raise BadField(name, f"a part of type {kind!r}", TEXT_ALONE, "not supported")


def encodable_text(name: str, text: str) -> str:
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
    encodable_text(name, text)


def with_system(row: dict[str, Any], prompt: Turn) -> Turn:
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
    message = {"role": "system", "content": encodable_text("system", system)}
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


def for_template(
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


def check_completion(name: str, side: Turn) -> None:
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


def number_of(row: dict[str, Any], name: str) -> float | None:
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
