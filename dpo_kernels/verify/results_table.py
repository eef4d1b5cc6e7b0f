"""Runs the checks and shows what they found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .contract import Target
from .mistakes import CHECKS, Check, Outcome

Results = dict[str, dict[str, Outcome]]  # by target, by check


def verify(
    targets: Sequence[Target],
    checks: Sequence[Check] = CHECKS,
    report: Callable[[str], None] = lambda line: None,
) -> Results:
    """Every check on every target; `report` gets a line for each as it ends."""
    found: Results = {}
    for target in targets:
        mine = found[target.name] = {}
        for check in checks:
            outcome = mine[check.name] = check(target)
            report(f"{target.name}: {check.name}: {outcome.status}  {outcome.detail}")
    return found


def as_json(targets: Sequence[Target], found: Results) -> dict[str, Any]:
    return {
        "versions": {target.name: target.versions for target in targets},
        "checks": {
            name: {check: [o.status, o.detail] for check, o in mine.items()}
            for name, mine in found.items()
        },
    }


def as_text(found: Results, width: int | None = None) -> str:
    """A line a check, a column a trainer; then what failed and why.

    `width` of the table: names that do not fit in are numbered.
    """
    names = list(found)
    checks = list(next(iter(found.values()))) if names else []
    wide = max(map(len, checks), default=0)
    head, heads, rows = " " * wide, names, []
    if width is not None and len("  ".join([head, *names])) > width:
        heads = [f"({i})" for i in range(1, len(names) + 1)]
        rows += [f"{short} {name}" for short, name in zip(heads, names, strict=True)]
    rows.append("  ".join([head, *(name.ljust(4) for name in heads)]).rstrip())
    for check in checks:
        cells = [
            found[name][check].status.ljust(max(len(short), 4))
            for name, short in zip(names, heads, strict=True)
        ]
        rows.append("  ".join([check.ljust(wide), *cells]).rstrip())
    for name in names:
        for check, outcome in found[name].items():
            if outcome.status != "pass":
                rows.append(f"{outcome.status}: {name}, {check}: {outcome.detail}")
    return "\n".join(rows)
