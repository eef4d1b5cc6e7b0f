"""argparse's keywords for a typed option."""

from __future__ import annotations

import argparse
from typing import Any, get_args, get_origin


def argument(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """argparse's keywords for a field's type; `None` can be written as none."""
    optional = type(None) in get_args(hint)
    kind = next(k for k in get_args(hint) if k is not type(None)) if optional else hint
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        return {"nargs": "+", "type": inner, "metavar": inner.__name__.upper()}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _boolean, "metavar": "BOOL"}
    if choices:
        return {"choices": choices}

    def convert(text: str) -> Any:
        return None if optional and text.lower() in ("none", "null") else kind(text)

    convert.__name__ = kind.__name__
    return {"type": convert, "metavar": "TEXT" if kind is str else kind.__name__.upper()}


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
