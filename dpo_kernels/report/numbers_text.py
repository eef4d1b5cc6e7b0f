"""Numbers as people read them, and the ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

NONE = "–"


def number(value: Any, digits: int = 4) -> str:
    """A number in `digits` significant ones: 0.6931, 12,345, 1.2e-05; a dash for none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NONE
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return (
            _minus(f"{int(value):,}") if abs(value) < 1e7 or isinstance(value, int) else _e(value)
        )
    size = abs(value)
    if size < 1e-4 or size >= 1e7:
        return _e(value, digits if size > 1e-6 else 2)
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{places}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return _minus("0" if text in ("-0", "0") else text)


def _e(value: float, digits: int = 4) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return _minus(f"{mantissa}e{int(exponent)}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def seconds(value: Any) -> str:
    """A time in the unit that fits it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    if value < 1:
        return f"{number(value * 1e3, 3)} ms"
    if value < 120:
        return f"{number(value, 3)} s"
    minutes = round(value / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def size(value: Any) -> str:
    """Bytes in MiB or GiB."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    if value < 2**30:
        return f"{number(value / 2**20, 3)} MiB"
    return f"{number(value / 2**30, 3)} GiB"


def steps_between(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not math.isfinite(span) or span <= 0 or most < 1:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20, 50):
        wide = step * factor
        if whole:
            wide = max(1.0, round(wide))
        first = math.ceil(low / wide - 1e-9)
        found = [k * wide for k in range(first, math.floor(high / wide + 1e-9) + 1)]
        if len(found) <= most:
            return found
    return [low]


def powers_between(low: float, high: float, base: float, most: int) -> list[float]:
    """At most `most` powers of `base` from `low` to `high`; of ten also 2 and 5 times one."""
    first = math.floor(math.log(low, base) + 1e-9)
    last = math.ceil(math.log(high, base) - 1e-9)
    exact = [base**k for k in range(first, last + 1)]
    fine = [b * f for b in exact for f in ((1, 2, 5) if base == 10 else (1,))]
    for found in (fine, exact, exact[::2], exact[::4], exact[::8]):
        inside = [x for x in found if low * 0.999 <= x <= high * 1.001]
        if 2 <= len(inside) <= most:
            return inside
    return steps_between(low, high, 3) if low < high else [low]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Labels of ticks, all with as many places as the finest needs."""
    if not ticks:
        return []
    largest = max(abs(t) for t in ticks)
    gap = min((b - a for a, b in pairwise(ticks)), default=largest or 1.0)
    if largest >= 1e6 or (0 < largest < 1e-3):
        return [number(t, 3) for t in ticks]
    for places in range(7):
        if all(abs(t - round(t, places)) < 1e-3 * abs(gap) for t in ticks):
            return [_minus(f"{t + 0.0:,.{places}f}") for t in ticks]
    return [number(t, 3) for t in ticks]
