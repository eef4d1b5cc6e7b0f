"""Rows of CSV and TSV text; cells of messages are JSON, cells of numbers are numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import BinaryIO

from .left_out import BadField, DataError, listed
from .row import NUMBERS, UNDECODED, Row, Rows

_JSON = (
    "tools",
    "chat_template_kwargs",
    "completions",
    "responses",
    "scores",
    "ranks",
    "rewards",
)


def csv_rows(
    shown: str, file: BinaryIO, delimiter: str, columns: Callable[[list[str]], list[str]]
) -> Rows:
    """The rows; `columns` gives what the header's names mean, or refuses it (`ValueError`)."""
    csv.field_size_limit(2**31 - 1)  # its default refuses texts of more than 128 KiB
    # What UTF-8 does not hold costs its row, not the file.
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    header: list[str] | None = None
    meant: list[str] = []
    line = 1
    while True:
        where = f"{shown}:{line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield where, BadField("line", f"broken CSV ({error})", "cells", "broken CSV")
            line = reader.line_num + 1
            continue
        if cells is None:
            return
        line = reader.line_num + 1
        if not any(cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            try:
                meant = columns(header)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from None
        else:
            yield where, _csv_row(header, meant, cells)


def plain_columns(header: list[str]) -> list[str]:
    """The header of a file of pairs, as it stands."""
    missing = {"chosen", "rejected"} - set(header)
    if missing or len(set(header)) < len(header):
        raise ValueError(
            f"the columns are {listed(header)}; expected "
            "'chosen', 'rejected' and 'prompt', each once"
        )
    return header


def _csv_row(header: list[str], meant: list[str], cells: list[str]) -> Row | BadField:
    if len(cells) != len(header):
        return BadField(
            "line", f"{len(cells)} cells", f"{len(header)}, as the header has", "broken CSV"
        )
    row: Row = dict(zip(header, cells, strict=True))
    if any(UNDECODED.search(cell) for cell in cells if not cell.isascii()):
        return BadField("line", "bytes that are no UTF-8", "text in UTF-8", "broken CSV")
    for column, name, text in zip(header, meant, cells, strict=True):
        start = text.lstrip()[:2]
        try:
            if name in ("chosen", "rejected", "prompt"):
                if text == "" and name == "prompt":
                    row[column] = None
                elif start == "[{":
                    row[column] = json.loads(text)
            elif text == "":
                row[column] = None
            elif name in NUMBERS:
                row[column] = float(text)
            elif name in _JSON or start == "[{":
                row[column] = json.loads(text)
        except (ValueError, RecursionError):
            return BadField(
                column,
                f"the text {text[:40]!r}",
                "a number" if name in NUMBERS else "messages as JSON",
                "mis-typed field",
            )
    return row
