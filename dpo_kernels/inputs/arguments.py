"""The arguments that the public functions and modules share, each checked in this one place.

A wrong one raises `TypeError` or `ValueError` that names it, what was expected and what came. What
depends on the batch (shapes, devices) is checked where the batch is known: `layout.py`,
`loss/from_pairs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ops.linear_logps import STRATEGIES, budget_of
from ..ops.token_logps import check_stats
from . import checks
from .transform import LogitTransform

_TRANSFORM = ("temperature", "logit_softcap", "logit_scale")


def _flag_or_none(name: str, value: object) -> None:
    if value is not None:
        checks.flag(name, value)


def _ignore_index(name: str, value: object) -> None:
    checks.whole(name, value, -(2**63))


def _backend(name: str, value: object) -> None:
    from ..backends import NAMES

    if value is not None:
        checks.choice(name, value, NAMES, " or None")


def _strategy(name: str, value: object) -> None:
    if value is not None:
        checks.choice(name, value, ("streaming", *STRATEGIES), " or None")


CHECKS: dict[str, Callable[[str, object], object]] = {
    "shift": checks.flag,
    "ignore_index": _ignore_index,
    "drop_common_prefix": checks.flag,
    "inplace": checks.flag,
    "batch_invariant": checks.flag,
    "ref_logps_per_token": _flag_or_none,
    "memory_budget": lambda name, value: budget_of(value),
    "reduction": lambda name, value: checks.choice(name, value, ("sum", "mean", "none")),
    "stats": lambda name, value: check_stats(value),
    "backend": _backend,
    "strategy": _strategy,
}


def check(**given: Any) -> None:
    """Raise for a wrong value among `given`; names that are not of `CHECKS` are not looked at."""
    for name, value in given.items():
        if name in CHECKS:
            CHECKS[name](name, value)
    transform = {name: value for name, value in given.items() if name in _TRANSFORM}
    if transform:
        LogitTransform.of(**transform)
