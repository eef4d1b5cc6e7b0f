"""How a run reads its rows, by the options of its configuration."""

from __future__ import annotations

from typing import Any

from ..data import LeftOut, NoUsableRow, Truncation


def truncation(config: Any) -> Truncation:
    """What becomes of pairs that are too long, by the options of these names."""
    return Truncation(
        config.max_length,
        config.truncation_mode,
        config.max_prompt_length,
        config.max_completion_length,
    )


def columns(config: Any) -> dict[str, str]:
    """Our column -> the data's, by the option column_mapping."""
    return dict(entry.split("=", 1) for entry in config.column_mapping or [])


_LENGTH_REASONS = {
    "longer than max_length",
    "prompt too long",
    "completion too short",
    "same after truncation",
}


def no_pair_left(file: str, left_out: LeftOut, since: int, kind: str = "pair") -> NoUsableRow:
    """The error of a file whose rows were all left out, the last of them by tokenisation."""
    reasons = {p.reason for p in left_out.problems[since:]}
    what = f"no {kind} fits max_length" if reasons <= _LENGTH_REASONS else f"no {kind} is left"
    return left_out.nothing(file, what, since)
