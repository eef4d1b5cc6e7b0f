"""What a run prints: plain lines, and a progress bar where a person watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Console:
    """Lines to standard output; bars to standard error if it is a terminal.

    Not on a terminal (a log file, CI), a bar becomes about four plain lines. `postfix` values of a
    bar are shown beside it.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self.is_terminal = not quiet and sys.stderr.isatty()

    def say(self, text: str = "") -> None:
        """Print one line, above a bar that may be running."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """A line that only matters where no bar runs (the bar already shows it)."""
        if not self.is_terminal:
            self.say(text)

    def progress(
        self, items: Iterable[T], what: str, total: int, unit: str, lines: bool = True
    ) -> Iterator[T]:
        """`items`, with a bar or with plain lines (unless the caller prints its own)."""
        if self.is_terminal:
            from tqdm import tqdm

            with tqdm(items, desc=what, total=total, unit=unit, dynamic_ncols=True) as bar:
                self._bar = bar
                try:
                    yield from bar
                finally:
                    self._bar = None
            return
        every = max(1, -(-total // 4)) if lines else total + 1
        for done, item in enumerate(items, start=1):
            yield item
            if done % every == 0 or (lines and done == total):
                self.say(f"{what}: {done}/{total} {unit}")

    def postfix(self, **values: str) -> None:
        """Show values beside the running bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
