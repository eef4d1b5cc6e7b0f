"""Pairs of a file that is larger than memory: read, checked and tokenised when they are asked for.

A plain JSONL file is known by the offsets of its lines (8 bytes a row); anything else is unpacked
row by row into a temporary file of that kind first. A row that cannot be used is left out as it is
met, and the next usable one stands in its place, so that a step has its pairs whatever comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from .files import Source, is_path, name_of, read_rows
from .json_rows import object_of
from .left_out import BadField, LeftOut
from .pairs import PairReader, PreferencePair
from .row import Row
from .sequences import TokenPair
from .tokenize import PairTokenizer

KEPT = 4096  # pairs that stay tokenised
_BLOCK = 1 << 24
_SHORT = 16  # bytes of a line that may be blank


class RowFile:
    """Rows of a JSONL file by number, from the places where its lines begin."""

    def __init__(self, path: str, name: str, spooled: bool = False) -> None:
        self.name, self.spooled = name, spooled
        self._file = open(path, "rb")  # noqa: SIM115  closed by `close`
        self._path = path if spooled else None
        self.starts, self.lines = _lines(self._file)

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, number: int) -> tuple[str, Row | BadField]:
        """(place, row) as `read_rows` gives them."""
        start = int(self.starts[number])
        self._file.seek(start)
        line = self._file.readline()
        if self.spooled:
            where, row = json.loads(line)
            return where, row
        return f"{self.name}:{int(self.lines[number])}", object_of(line.strip())

    def digest(self) -> str:
        """sha256 of the file's bytes."""
        found = hashlib.sha256()
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            found.update(block)
        return found.hexdigest()

    def close(self) -> None:
        self._file.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def _lines(file: Any) -> tuple[np.ndarray, np.ndarray]:
    """(offsets of the lines that are not empty, their numbers from 1)."""
    starts, at = [np.zeros(1, np.int64)], 0
    while block := file.read(_BLOCK):
        found = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (at + 1)
        starts.append(found.astype(np.int64))
        at += len(block)
    every = np.concatenate(starts)
    ends = np.append(every[1:], at)
    keep = ends - every > 1
    for number in np.flatnonzero(keep & (ends - every < _SHORT)).tolist():
        file.seek(int(every[number]))
        keep[number] = bool(file.readline().strip())
    return every[keep], np.flatnonzero(keep) + 1


def row_file(
    source: Source, left_out: LeftOut, columns: Mapping[str, str] | None, folder: str | None = None
) -> RowFile:
    """The rows of any source by number."""
    if is_path(source) and _plain_jsonl(str(source)) and not columns:
        return RowFile(str(source), name_of(source))
    handle, path = tempfile.mkstemp(prefix="dpo-kernels-rows-", suffix=".jsonl", dir=folder)
    with os.fdopen(handle, "w", encoding="ascii") as out:
        for where, row in read_rows(source, columns):
            if isinstance(row, BadField):
                left_out.add(row.at(where))
            else:
                out.write(json.dumps([where, row], default=str) + "\n")
    return RowFile(path, name_of(source), spooled=True)


def _plain_jsonl(name: str) -> bool:
    path = Path(name)
    if not path.is_file() or path.suffix.lower() in (".csv", ".tsv"):
        return False
    with path.open("rb") as file:
        head = file.read(4096).lstrip()
    return head.startswith(b"{") and head.split(b"\n", 1)[0].rstrip() != b"{"


class StreamedPairs(Sequence[TokenPair]):
    """Tokenised pairs by number; row numbers `rows` of a file."""

    def __init__(
        self,
        file: RowFile,
        rows: np.ndarray,
        reader: PairReader,
        tokenizer: PairTokenizer,
        check: Callable[[PreferencePair], None] = lambda pair: None,
    ) -> None:
        self.file, self.rows, self.reader, self.tokenizer = file, rows, reader, tokenizer
        self.check = check  # raises `BadField` for a pair that the run cannot use
        self._kept: OrderedDict[int, TokenPair] = OrderedDict()
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> TokenPair: ...
    @overload
    def __getitem__(self, i: slice) -> list[TokenPair]: ...
    def __getitem__(self, i: int | slice) -> TokenPair | list[TokenPair]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        n = len(self.rows)
        if not -n <= i < n:
            raise IndexError(i)
        for k in range(n):
            pair = self._pair(int(self.rows[(i + k) % n]))
            if pair is not None:
                return pair
        raise self.reader.left_out.nothing(self.file.name, "no pair is left")

    def __iter__(self) -> Iterator[TokenPair]:
        return (self[i] for i in range(len(self)))

    def digest(self) -> str:
        """sha256 of the file and of which of its rows these are."""
        found = hashlib.sha256(self.rows.astype("<i8").tobytes())
        found.update(self.file.digest().encode())
        return found.hexdigest()

    def text(self, number: int) -> PreferencePair | None:
        """The pair of a row of the file as texts; None where it is left out, which is told once."""
        if number in self._bad:
            return None
        where, row = self.file.row(number)
        pair = self.reader.pair(row, where)
        if pair is not None:
            try:
                self.check(pair)
            except BadField as bad:
                self.reader.left_out.add(bad.at(where))
                pair = None
        if pair is None:
            self._bad.add(number)
        return pair

    def _pair(self, number: int) -> TokenPair | None:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        if number in self._bad:
            return None
        text = self.text(number)
        pair = None if text is None else self.tokenizer.usable(text)
        if pair is None:
            self._bad.add(number)
            return None
        self._kept[number] = pair
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return pair
