"""Rows of JSON text: one object a line, or one list of objects; each with its line."""

from __future__ import annotations

import io
import json
from typing import Any, BinaryIO

from .left_out import DAMAGED, BadField, DataError
from .row import EXPECTED, Row, Rows, as_object


def json_rows(shown: str, file: BinaryIO) -> Rows:
    numbered = enumerate(file, start=1)
    number, raw = next(((n, raw) for n, raw in numbered if raw.strip()), (0, b""))
    start = raw.strip()
    if not start:
        return
    if start.startswith(b"["):
        rest = file.read()
        if not rest.strip() or not _is_line(start):
            yield from _list_rows(shown, b"\n" * (number - 1) + raw + rest)
            return
        file = io.BytesIO(rest)
    yield f"{shown}:{number}", object_of(start)
    for more in file:
        number += 1
        if start == b"{" and more.strip()[:1] in (b'"', b"}"):
            raise DataError(
                f"{shown}:{number - 1}: one JSON object over several lines, expected {EXPECTED}"
            )
        start = b""
        if more.strip():
            yield f"{shown}:{number}", object_of(more)


def _is_line(text: bytes) -> bool:
    """Whether a text that begins with `[` is one line among others, and no list of rows."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return not value or not all(isinstance(row, dict) for row in value)


def _list_rows(shown: str, content: bytes) -> Rows:
    """The elements of one JSON list. Behind a broken one it goes on where a row begins again."""
    text = content.decode("utf-8", "surrogateescape")  # what is no UTF-8 costs its row
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    names: set[str] = set()
    at, line, counted = _skipped(text, text.index("[") + 1), 1, 0

    def place() -> str:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, at), at
        return f"{shown}:{line}"

    while text[at : at + 1] != "]":
        where = place()
        try:
            value, end = decoder.raw_decode(text, at)
            row: Row | BadField = as_object(value)
        except BadField as bad:
            row, end = bad, json.JSONDecoder().raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            got = "the end of the file" if at >= len(text) else f"broken JSON list ({error})"
            yield where, BadField("line", got, "one JSON object", DAMAGED)
            at = _next_row(text, at, names)
            if at < 0:
                return
            continue
        if isinstance(row, dict):
            names |= row.keys()
            if not text.isascii() and _undecodable(text[at:end]):
                row = BadField("line", "bytes that are no UTF-8", "text in UTF-8", "broken JSON")
        yield where, row
        at = _skipped(text, end)
        comma = text[at : at + 1] == ","
        if comma:
            at = _skipped(text, at + 1)
            if text[at : at + 1] not in ("]", ""):
                continue
        if comma or text[at : at + 1] != "]":
            got = repr(text[at : at + 1]) if at < len(text) else "the end of the file"
            got = "a comma and no more" if comma and at < len(text) else got
            yield place(), BadField("line", f"{got} in a JSON list", "',' or ']'", DAMAGED)
            at = at if comma else _next_row(text, at, names)
            if at < 0 or at >= len(text):
                return
    at = _skipped(text, at + 1)
    if at < len(text):
        yield place(), BadField("line", "more behind a JSON list", "its end", DAMAGED)


def _skipped(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _undecodable(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


# Names by which a row is known from an object within one, where none was read yet.
_NAMES = {"prompt", "chosen", "rejected", "messages", "completion", "completions", "responses"}
_NAMES |= {"text", "instruction", "conversations", "output_A", "output_1", "context", "output"}


def _next_row(text: str, at: int, names: set[str]) -> int:
    """Where, behind `at`, a whole object begins that has the names of a row; -1 if nowhere."""
    decoder = json.JSONDecoder()
    wanted = {name for name in names if name not in ("role", "content")} or _NAMES
    while (at := text.find("{", at + 1)) >= 0:
        if text[:at].rstrip()[-1:] == ":":  # a value within a row
            continue
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        behind = text[_skipped(text, end) :][:1]
        if isinstance(value, dict) and wanted & value.keys() and behind in (",", "]", ""):
            return at
    return -1


def object_of(raw: bytes) -> Row | BadField:
    """One line as a JSON object, or what is wrong with it."""
    try:
        # A mark of byte order stands in the middle of files that were put together.
        text = raw.decode("utf-8").removeprefix("\ufeff")
        return as_object(json.loads(text, object_pairs_hook=_unique))
    except BadField as bad:
        return bad
    except (ValueError, RecursionError) as error:
        syntax = isinstance(error, json.JSONDecodeError)
        detail = f"invalid JSON ({error})" if syntax else f"undecodable line ({error})"
        return BadField("line", detail, "one JSON object", "broken JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that comes twice the second would win without a word."""
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadField("line", f"the key {twice!r} twice", "each key once", "broken JSON")
    return row
