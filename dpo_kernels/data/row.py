"""What a reader gives: rows, each with its place, or what is wrong with one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .left_out import BadField

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | BadField]]

EXPECTED = "JSONL (one JSON object a line), a JSON list of objects, or CSV"
# Columns of one number a pair.
NUMBERS = ("margin", "weight", "beta", "label_smoothing")


def as_object(value: object) -> Row:
    """A row, which is an object; `BadField` otherwise."""
    if not isinstance(value, dict):
        raise BadField("line", kind_of(value), "one JSON object", "broken JSON")
    return value


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
