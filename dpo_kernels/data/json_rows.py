"""Rows of JSON text: one object a line, or one list of objects; each with its line."""

from __future__ import annotations

import io
import json
from typing import Any, BinaryIO

from .left_out import BadField, DataError
from .row import EXPECTED, Row, Rows, as_object


def json_rows(shown: str, file: BinaryIO) -> Rows:
    numbered = enumerate(file, start=1)
    number, raw = next(((n, raw) for n, raw in numbered if raw.strip()), (0, b""))
    start = raw.strip()
    if not start:
        return
    if start.startswith(b"["):
        rest = file.read()
        if not rest.strip() or not _complete(start):
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


def _complete(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _list_rows(shown: str, content: bytes) -> Rows:
    """The elements of one JSON list. A broken one is refused: nothing says where it goes on."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{shown}:{line}: undecodable text in a JSON list ({error})") from None
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    at, line, counted = text.index("[") + 1, 1, 0

    def skip(at: int) -> int:
        while text[at : at + 1].isspace():
            at += 1
        return at

    at = skip(at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{shown}:{line}"
        try:
            value, end = decoder.raw_decode(text, at)
            row: Row | BadField = as_object(value)
        except BadField as bad:
            row, end = bad, json.JSONDecoder().raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: broken JSON list ({error}), expected {EXPECTED}") from None
        yield where, row
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            if text[at : at + 1] != "]":
                continue
        if text[at : at + 1] != "]" or text[end:at].count(","):
            line += text.count("\n", counted, at)
            got = repr(text[at : at + 1]) if at < len(text) else "the end of the file"
            raise DataError(f"{shown}:{line}: {got} in a JSON list, expected ',' or ']'")
    after = skip(at + 1)
    if after < len(text):
        line += text.count("\n", counted, after)
        raise DataError(f"{shown}:{line}: a JSON list followed by more, expected {EXPECTED}")


def object_of(raw: bytes) -> Row | BadField:
    """One line as a JSON object, or what is wrong with it."""
    try:
        return as_object(json.loads(raw.decode("utf-8"), object_pairs_hook=_unique))
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
