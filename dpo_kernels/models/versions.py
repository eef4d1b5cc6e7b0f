"""Versions of packages, and what changed between those of transformers."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any


def number(text: str) -> tuple[int, ...]:
    """The numbers of a version, without what follows them: "1.16.0.dev0" -> (1, 16, 0)."""
    parts = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)


@functools.cache
def transformers_before(*release: int) -> bool:
    """Whether the installed transformers is older than `release`."""
    return number(version("transformers")) < release


def dtype_option(dtype: Any) -> dict[str, Any]:
    """The dtype as `from_pretrained` and `from_config` call it: renamed in transformers 4.56."""
    return {"torch_dtype" if transformers_before(4, 56) else "dtype": dtype}
