"""Rows of JSON text: one object a line, or one list of objects; each with its line."""

from __future__ import annotations

import codecs
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from .left_out import DAMAGED, BadField, DataError
from .row import EXPECTED, UNDECODED, Row, Rows, as_object

BLOCK = 1 << 20  # of a list that is read at a time, in bytes or letters
_WORD = 16  # letters: as long as a word or escape of JSON is at most
_utf8 = codecs.getincrementaldecoder("utf-8")


def json_rows(shown: str, file: BinaryIO) -> Rows:
    number, raw = 1, file.readline(BLOCK)  # a list may be one line, larger than memory
    while raw and not raw.strip():
        number, raw = number + raw.endswith(b"\n"), file.readline(BLOCK)
    start = raw.strip()
    if not start:
        return
    lines = _lines(file, number)
    if start.startswith(b"["):
        behind = next(lines, None) if raw.endswith(b"\n") and _is_line(start) else None
        if behind is None:
            yield from _list_rows(shown, b"\n" * (number - 1) + raw, file)
            return
        lines = itertools.chain([behind], lines)
    elif not raw.endswith(b"\n"):
        start = (raw + file.readline()).strip()
    yield f"{shown}:{number}", object_of(start)
    for at, more in lines:
        if start == b"{" and more.strip()[:1] in (b'"', b"}"):
            raise DataError(
                f"{shown}:{number}: one JSON object over several lines, expected {EXPECTED}"
            )
        start = b""
        yield f"{shown}:{at}", object_of(more)


def _lines(file: BinaryIO, number: int) -> Iterator[tuple[int, bytes]]:
    """The lines behind line `number` that are not blank, with their numbers."""
    for raw in file:
        number += 1
        if raw.strip():
            yield number, raw


def _is_line(text: bytes) -> bool:
    """Whether a text that begins with `[` is one line among others, and no list of rows."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return not value or not all(isinstance(row, dict) for row in value)


class _Window:
    """The text of a file from some place on, decoded as it is asked for.

    What is no UTF-8 is kept apart (`UNDECODED`): it costs its row.
    """

    def __init__(self, start: bytes, file: BinaryIO) -> None:
        self._file, self._decoder = file, _utf8("surrogateescape")
        self.text, self.line = self._decoder.decode(start), 1
        self._counted = 0

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        block = self._file.read(max(BLOCK, len(self.text)))
        self.text += self._decoder.decode(block, not block)
        return bool(block)

    def rest(self) -> None:
        """Read on to the end."""
        while self.more():
            pass

    def skipped(self, at: int) -> int:
        """The next place that is no space."""
        while True:
            at = _skipped(self.text, at)
            if at < len(self.text) or not self.more():
                return at

    def line_of(self, at: int) -> int:
        """The line of a place; they are asked for in order."""
        self.line, self._counted = self.line + self.text.count("\n", self._counted, at), at
        return self.line

    def passed(self, at: int) -> int:
        """The same place once what lies before it is let go, which is done now and then."""
        if at < max(BLOCK, len(self.text) // 2):
            return at
        self.line_of(at)
        self.text, self._counted = self.text[at:], 0
        return 0


def _list_rows(shown: str, start: bytes, file: BinaryIO) -> Rows:
    """The elements of one JSON list, which is never in memory whole.

    Behind a broken element it goes on where a row begins again; to find that it reads to the end.
    """
    window = _Window(start, file)
    twice: list[BadField] = []
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: _noted(pairs, twice))
    names: set[str] = set()
    at = window.skipped(window.text.index("[") + 1)

    def place(at: int) -> str:
        return f"{shown}:{window.line_of(at)}"

    while window.text[at : at + 1] != "]":
        at = window.passed(at)
        where = place(at)
        twice.clear()
        try:
            value, end = decoder.raw_decode(window.text, at)
            if end == len(window.text) and window.more():
                continue  # a number may go on
            row: Row | BadField = as_object(value)
        except BadField as bad:
            row = bad
        except (ValueError, RecursionError) as error:
            if _goes_on(error, window.text) and window.more():
                continue
            got = "the end of the file" if at >= len(window.text) else f"broken JSON list ({error})"
            yield where, BadField("line", got, "one JSON object", DAMAGED)
            window.rest()
            at = _next_row(window.text, at, names)
            if at < 0:
                return
            continue
        if twice:
            row = twice[0]
        if isinstance(row, dict):
            names |= row.keys()
            if not window.text.isascii() and UNDECODED.search(window.text, at, end):
                row = BadField("line", "bytes that are no UTF-8", "text in UTF-8", "broken JSON")
        yield where, row
        at = window.skipped(end)
        comma = window.text[at : at + 1] == ","
        if comma:
            at = window.skipped(at + 1)
            if window.text[at : at + 1] not in ("]", ""):
                continue
        text = window.text
        if comma or text[at : at + 1] != "]":
            got = repr(text[at : at + 1]) if at < len(text) else "the end of the file"
            got = "a comma and no more" if comma and at < len(text) else got
            yield place(at), BadField("line", f"{got} in a JSON list", "',' or ']'", DAMAGED)
            window.rest()
            at = at if comma else _next_row(window.text, at, names)
            if at < 0 or at >= len(window.text):
                return
    at = window.skipped(at + 1)
    if at < len(window.text):
        yield place(at), BadField("line", "more behind a JSON list", "its end", DAMAGED)


def _goes_on(error: Exception, text: str) -> bool:
    """Whether an element may be broken only because the rest of it is not read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return "Unterminated string" in error.msg or error.pos >= len(text) - _WORD


def _skipped(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _before(text: str, at: int) -> str:
    """The last letter before `at` that is no space."""
    at -= 1
    while at >= 0 and text[at].isspace():
        at -= 1
    return text[at] if at >= 0 else ""


# Names by which a row is known from an object within one, where none was read yet.
_NAMES = {"prompt", "chosen", "rejected", "messages", "completion", "completions", "responses"}
_NAMES |= {"text", "instruction", "conversations", "output_A", "output_1", "context", "output"}


def _next_row(text: str, at: int, names: set[str]) -> int:
    """Where, behind `at`, a whole object begins that has the names of a row; -1 if nowhere."""
    decoder = json.JSONDecoder()
    wanted = {name for name in names if name not in ("role", "content")} or _NAMES
    while (at := text.find("{", at + 1)) >= 0:
        if _before(text, at) == ":":  # a value within a row
            continue
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        after = _skipped(text, end)
        behind = text[after : after + 1]
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
        raise _twice(pairs)
    return row


def _noted(pairs: list[tuple[str, Any]], twice: list[BadField]) -> dict[str, Any]:
    """The same within a list, whose element is read to its end first."""
    row = dict(pairs)
    if len(row) != len(pairs):
        twice.append(_twice(pairs))
    return row


def _twice(pairs: list[tuple[str, Any]]) -> BadField:
    key = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
    return BadField("line", f"the key {key!r} twice", "each key once", "broken JSON")
