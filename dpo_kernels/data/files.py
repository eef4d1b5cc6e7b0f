"""Rows of a file of preference data: JSONL, a JSON list, CSV; packed or not; a pipe or a name.

The content decides, not the name, except for CSV (`.csv`, `.tsv`): a file that begins with `[` is
one JSON list, everything else has one JSON object a line. gzip, bzip2 and xz are unpacked. `-` is
standard input. Each row comes with its place, `file:line`; a broken one comes as a `BadField`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .left_out import BadField, DataError

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | BadField]]

_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_FOREIGN = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"\xff\xfe\x00\x00": "text in UTF-32",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"\x93NUMPY": "a NumPy file",
    b"SQLite": "a database",
}
_EXPECTED = "JSONL (one JSON object a line), a JSON list of objects, or CSV"
_BOM = b"\xef\xbb\xbf"
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """(place, row or what is wrong with it) of each row; `DataError` if there is no reading it."""
    name = os.fspath(path)
    shown = "<stdin>" if name == "-" else name
    with _opened(name) as raw:
        stem = Path(name)
        if stem.suffix in (".gz", ".bz2", ".xz"):
            stem = stem.with_suffix("")
        try:
            file = _unpacked(shown, raw)
            if stem.suffix.lower() in (".csv", ".tsv"):
                yield from _csv_rows(shown, file, "\t" if stem.suffix.lower() == ".tsv" else ",")
            else:
                yield from _json_rows(shown, file)
        except _BROKEN as error:
            raise DataError(f"{shown} cannot be read to its end: {error}") from None


def _opened(name: str) -> io.BufferedReader:
    if name == "-":
        stream = getattr(sys.stdin, "buffer", None)
        if stream is None:
            raise DataError("standard input (-) is closed")
        return stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    path = Path(name)
    if path.is_dir() or not path.exists():  # a pipe, as of `<(...)`, exists and is no plain file
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}, expected a JSONL file (one JSON object a line)")
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from None


def _unpacked(shown: str, raw: io.BufferedReader) -> BinaryIO:
    """The stream past its packing and its byte order mark."""
    file: Any = raw
    head = file.peek(8)
    for magic, unpack in _PACKED.items():
        if head.startswith(magic):
            file = io.BufferedReader(unpack(file))
            head = file.peek(8)
            break
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{shown} is {what}, expected {_EXPECTED}")
    if head.startswith(_BOM):
        file.read(len(_BOM))
    return file


def _json_rows(shown: str, file: BinaryIO) -> Rows:
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
    yield f"{shown}:{number}", _object(start)
    for more in file:
        number += 1
        if start == b"{" and more.strip()[:1] in (b'"', b"}"):
            raise DataError(
                f"{shown}:{number - 1}: one JSON object over several lines, expected {_EXPECTED}"
            )
        start = b""
        if more.strip():
            yield f"{shown}:{number}", _object(more)


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
            row: Row | BadField = _as_object(value)
        except BadField as bad:
            row, end = bad, json.JSONDecoder().raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: broken JSON list ({error}), expected {_EXPECTED}") from None
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
        raise DataError(f"{shown}:{line}: a JSON list followed by more, expected {_EXPECTED}")


def _object(raw: bytes) -> Row | BadField:
    """One line as a JSON object, or what is wrong with it."""
    try:
        return _as_object(json.loads(raw.decode("utf-8"), object_pairs_hook=_unique))
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


def _as_object(value: object) -> Row:
    if not isinstance(value, dict):
        raise BadField("line", kind_of(value), "one JSON object", "broken JSON")
    return value


def _csv_rows(shown: str, file: BinaryIO, delimiter: str) -> Rows:
    csv.field_size_limit(2**31 - 1)  # its default refuses texts of more than 128 KiB
    reader = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), delimiter=delimiter)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{shown}:{line}", reader.line_num + 1
            if not any(cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                missing = {"chosen", "rejected"} - set(header)
                if missing or len(set(header)) < len(header):
                    raise DataError(
                        f"{where}: the columns are {', '.join(header)}; expected "
                        "'chosen', 'rejected' and 'prompt', each once"
                    )
            else:
                yield where, _csv_row(header, cells)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{shown}:{line}: broken CSV ({error})") from None


def _csv_row(header: list[str], cells: list[str]) -> Row | BadField:
    if len(cells) != len(header):
        return BadField(
            "line", f"{len(cells)} cells", f"{len(header)}, as the header has", "broken CSV"
        )
    row: Row = dict(zip(header, cells, strict=True))
    for name, text in row.items():
        start = text.lstrip()[:2]
        try:
            if name in ("prompt", "chosen", "rejected"):
                if text == "" and name == "prompt":
                    row[name] = None
                elif start == "[{":
                    row[name] = json.loads(text)
            elif text == "":
                row[name] = None
            elif name in ("margin", "weight", "beta"):
                row[name] = float(text)
            elif name in ("tools", "chat_template_kwargs"):
                row[name] = json.loads(text)
        except (ValueError, RecursionError):
            return BadField(
                name,
                f"the text {text[:40]!r}",
                "a number" if name in ("margin", "weight", "beta") else "messages as JSON",
                "mis-typed field",
            )
    return row


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
