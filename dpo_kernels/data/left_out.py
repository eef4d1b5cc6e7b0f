"""What became of the rows: those that were left out, each with its reason, and counts of the rest.

A row that cannot be used is never dropped in silence. It becomes a `Problem` that says where, which
field, what came and what was expected. `LeftOut` prints the first of each kind, counts them all,
writes them all to a file, or refuses the first one (`strict`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

SHOWN = 20  # lines printed of one kind; the rest is counted
LONGEST = 300  # letters of what came, in a message
_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def one_line(text: str, most: int = LONGEST) -> str:
    """What the data say, as it may stand in a message: one line of an end, without escapes."""
    text = _BREAKS.sub(" ", text)
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[str]) -> str:
    """Names that the data gave, the first of them."""
    shown = [one_line(name, 120) for name in names]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


class DataError(ValueError):
    """The data cannot be used as asked; the message names file, line and field."""


class MissingPackage(DataError):
    """The data cannot be read here, and could be with a package that is not installed."""


DAMAGED = "damaged file"  # the heading of a file that is read in part


class NoUsableRow(DataError):
    """The file was read, and every row of it was left out."""


@dataclass(frozen=True)
class Problem:
    """Why one row was left out."""

    where: str  # "file:line"
    field: str
    got: str
    expected: str
    reason: str  # the heading it is counted under

    def __post_init__(self) -> None:
        for name in ("field", "got"):  # which the data may have filled with anything
            object.__setattr__(self, name, one_line(getattr(self, name)))

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.got}, expected {self.expected}"


class BadField(Exception):
    """Raised while one row is read; turned into a `Problem` with file and line."""

    def __init__(self, name: str, got: str, expected: str, reason: str) -> None:
        super().__init__(name)
        self.name, self.got, self.expected, self.reason = name, got, expected, reason

    def at(self, where: str) -> Problem:
        return Problem(where, self.name, self.got, self.expected, self.reason)


class Refused(Exception):
    """(field, got, expected, reason) of a pair that cannot be used."""


@dataclass
class LeftOut:
    """Collects problems: shows the first of a kind, counts all, refuses the first if strict."""

    strict: bool = False
    report: Callable[[str], None] | None = None
    problems: list[Problem] = field(default_factory=list)  # all, or the first `keep` of a kind
    keep: int | None = None
    sink: Callable[[Problem], None] | None = None  # is told of each
    notes: Counter[str] = field(default_factory=Counter)  # what was met in rows that are used
    _said: set[str] = field(default_factory=set)
    _kinds: Counter[str] = field(default_factory=Counter)

    def add(self, problem: Problem) -> None:
        """Record one row as left out; raises `DataError` if strict."""
        if self.strict:
            raise DataError(f"{problem} (--strict refuses bad rows)")
        self._kinds[problem.reason] += 1
        if self.keep is None or self._kinds[problem.reason] <= self.keep:
            self.problems.append(problem)
        if self.sink is not None:
            self.sink(problem)
        if self.report is not None and self._kinds[problem.reason] <= SHOWN:
            self.report(f"left out: {problem}")
        elif self._kinds[problem.reason] == SHOWN + 1:
            self.once(f"left out: more rows for this reason ({problem.reason}) are only counted")

    def once(self, text: str) -> None:
        """A line about the data, said the first time only."""
        if self.report is not None and text not in self._said:
            self.report(text)
        self._said.add(text)

    def said(self) -> list[str]:
        """What was said once."""
        return sorted(self._said)

    def counts(self) -> dict[str, int]:
        """Rows left out by reason, most frequent first."""
        return dict(self._kinds.most_common())

    @property
    def total(self) -> int:
        """Rows left out."""
        return self._kinds.total()

    def shown(self) -> list[str]:
        """The problems that were printed, at most `SHOWN` of a kind."""
        kinds: Counter[str] = Counter()
        lines = []
        for problem in self.problems:
            kinds[problem.reason] += 1
            if kinds[problem.reason] <= SHOWN:
                lines.append(str(problem))
        return lines

    def summary(self) -> str:
        """One line for the end of a run."""
        if not self.total:
            return "left out: nothing"
        parts = ", ".join(f"{n} {reason}" for reason, n in self.counts().items())
        return f"left out: {self.total} ({parts})"

    def remarks(self) -> list[str]:
        """Lines about what was counted in the rows that are used."""
        return [f"{n} {what}" for what, n in self.notes.most_common()]

    def nothing(self, path: object, what: str, since: int = 0) -> NoUsableRow:
        """The error of a file without a usable row: the counts and the first reason in full."""
        found = sorted(self.problems[since:], key=lambda p: p.reason != DAMAGED)
        first = f"; the first: {found[0]}" if found else ""
        return NoUsableRow(f"{path}: {what}; {self.summary()}{first}")

    def write(self, path: Path) -> None:
        """Every problem, one JSON object a line, in the order of the files and their lines."""
        files = {_place(p)[0]: i for i, p in reversed([*enumerate(self.problems)])}
        rows = sorted(self.problems, key=lambda p: (files[_place(p)[0]], _place(p)[1]))
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for problem in rows:
                file.write(problem.as_json())


def _place(problem: Problem) -> tuple[str, int]:
    """(file, line) of a problem."""
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.where, 0)
