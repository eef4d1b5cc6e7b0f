"""What a run prints, and how it is interrupted: at the end of a step, not within it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; `code` is the exit code of that."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.agreed = False  # whether all ranks end at this step
        self.code = 128 + number


class Console:
    """Lines to standard output; bars to standard error if it is a terminal.

    Not on a terminal (a log file, CI), a bar becomes about four plain lines. `postfix` values of a
    bar are shown beside it.

    Within `signals`, Ctrl-C and SIGTERM raise `Interrupted`: at once, or from `progress` when the
    item at work is done (weights are then between two steps); a second one raises at once.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self.is_terminal = not quiet and sys.stderr.isatty()
        self.begun: set[str] = set()  # names of bars that have had their first item
        self.done = 0  # items of the latest bar
        self._holding = 0
        self._pending: Interrupted | None = None
        # On many ranks a signal of one ends the step of all: the loop says which it was.
        self.shared = False
        self.agreed: int | None = None
        self.silent = False

    def say(self, text: str = "") -> None:
        """Print one line, above a bar that may be running."""
        if self.quiet:
            return
        try:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except UnicodeEncodeError:  # half a character of the data, or a terminal that knows few
            known = sys.stdout.encoding or "ascii"
            print(text.encode(known, "backslashreplace").decode(known), flush=True)
        except BrokenPipeError:  # the reader has left (`| head`); that ends no training
            silence(sys.stdout)
            self.quiet = True

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
                    yield from self._whole_items(bar, what)
                finally:
                    self._bar = None
            return
        every = max(1, -(-total // 4)) if lines else total + 1
        for done, item in enumerate(self._whole_items(items, what), start=1):
            yield item
            if done % every == 0 or (lines and done == total):
                self.say(f"{what}: {done}/{total} {unit}")

    def _whole_items(self, items: Iterable[T], what: str) -> Iterator[T]:
        """The items; a signal that comes while the caller works on one is raised behind it."""
        self.done = 0
        for item in items:
            self.begun.add(what)
            with self.held():
                yield item
                self.done += 1
            if self.shared:
                if self.agreed is not None:
                    interrupted = Interrupted(self.agreed)
                    interrupted.agreed = True
                    raise interrupted
            elif self._pending is not None:
                raise self._pending

    def follow(self, follows: bool) -> None:
        """Say nothing, where another process speaks for this one."""
        if follows:
            self.quiet, self.is_terminal, self.silent = True, False, True

    @contextlib.contextmanager
    def sharing(self, many: bool) -> Iterator[None]:
        """Within, of many ranks, a signal counts that all have agreed on (`agreed`)."""
        self.shared, self.agreed = many, None
        try:
            yield
        finally:
            self.shared = False

    @property
    def signal(self) -> int | None:
        """The number of a signal that waits for the item at work."""
        return None if self._pending is None else self._pending.number

    def postfix(self, **values: str) -> None:
        """Show values beside the running bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait (for a step to end, for a model to be saved); a second one does not."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP raise `Interrupted`; what was set before comes back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            # What is ignored (SIGHUP under nohup) stays so.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        interrupted = Interrupted(number)
        if not self._holding or self._pending is not None:
            raise interrupted
        self._pending = interrupted
        if self.silent:
            return
        with contextlib.suppress(OSError, RuntimeError):
            print(
                f"dpo-kernels: {interrupted}: finishing this step (again: stop at once)",
                file=sys.stderr,
                flush=True,
            )


def silence(stream: TextIO) -> None:
    """Send a stream whose reader has left to nowhere, so that flushing it at exit is no error."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
