"""What a reader gives: rows, each with its place, or what is wrong with one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from .left_out import BadField

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | BadField]]

EXPECTED = "JSONL (one JSON object a line), a JSON list of objects, or CSV"
# What `surrogateescape` makes of bytes that are no UTF-8.
UNDECODED = re.compile("[\udc80-\udcff]")
# Columns of one number a pair.
NUMBERS = ("margin", "weight", "beta", "label_smoothing")

_FP32_LEAST, _FP32_MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
_WANTED = {
    "margin": "a finite number",
    "weight": "a number of at least 0",
    "beta": "a number above 0",
    "label_smoothing": "a number in [0, 1)",
}


def number_wanted(name: str, number: float | None) -> str:
    """What a number of a pair should have been; "" where it is that.

    The loss computes in fp32, where more would be inf and a smaller beta 0.
    """
    wanted = _WANTED[name]
    if number is None:
        return wanted
    fits = abs(number) <= _FP32_MOST and (name != "beta" or number >= _FP32_LEAST)
    fits = fits and (name != "label_smoothing" or number < 1)
    least = -math.inf if name == "margin" else 0.0
    if fits and number >= least:
        return ""
    if name != "label_smoothing" and math.isfinite(number) and number >= least and number != 0:
        return f"{wanted} in the range of fp32"
    return wanted


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
