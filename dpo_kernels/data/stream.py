"""Pairs of a file that is larger than memory: read, checked and tokenised when they are asked for.

A JSONL file is known by the offsets of its lines (8 bytes a row); one that is packed, or comes by a
pipe, is unpacked into a temporary file, and what is no JSONL is written there row by row. A row
that cannot be used is left out as it is met, and the next usable one stands in its place, so that a
step has its pairs whatever comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from .files import DataFile, Source, folder_files, is_path, name_of, opened, read_rows, renamed
from .json_rows import object_of
from .left_out import BadField, DataError, LeftOut
from .pairs import PairReader, PreferencePair
from .row import Row, Rows
from .sequences import TokenPair
from .table_rows import table_size
from .tokenize import PairTokenizer

KEPT = 4096  # pairs that stay tokenised
LARGE, MANY = 256 << 20, 200_000  # bytes, unpacked, and rows above which data are not read first
_BLOCK = 1 << 24
_SHORT = 16  # bytes of a line that may be blank


class RowFile:
    """Rows of a JSONL file by number, from the places where its lines begin.

    `rename`: the data's names -> ours. `spooled`: the lines are (place, row) as `row_file` writes
    them. `temporary`: the file goes when it is closed.
    """

    def __init__(
        self,
        path: str,
        name: str,
        rename: Mapping[str, str] | None = None,
        spooled: bool = False,
        temporary: bool = False,
    ) -> None:
        self.name, self.rename, self.spooled = name, rename or {}, spooled
        self._file = open(path, "rb")  # noqa: SIM115  closed by `close`
        self._path = path if temporary else None
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
        where = f"{self.name}:{int(self.lines[number])}"
        return where, renamed(object_of(line.strip()), self.rename)

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
    if not is_path(source) or (str(source) != "-" and not Path(source).exists()):
        return _spooled(read_rows(source, columns), source, left_out, folder)
    if str(source) != "-" and Path(source).is_dir():
        return _spooled(read_rows(source, columns), source, left_out, folder)
    rename = {theirs: ours for ours, theirs in (columns or {}).items()}
    name = os.fspath(source)
    with opened(name) as raw:
        file = DataFile(name, raw)
        if not file.has_lines():
            return _spooled(file.rows(rename), source, left_out, folder)
        if not file.packed:
            return RowFile(name, name_of(source), rename)
        with _temporary(folder) as (out, path):
            shutil.copyfileobj(file.file, out, _BLOCK)
        rows = RowFile(path, name_of(source), rename, temporary=True)
        if (damage := file.damage()) is not None:
            last = int(rows.lines[-1]) if len(rows) else 1
            left_out.add(damage.at(f"{rows.name}:{last}"))
        return rows


def _spooled(rows: Rows, source: Source, left_out: LeftOut, folder: str | None) -> RowFile:
    """Rows that can be read in their order alone, written as lines of (place, row)."""
    with _temporary(folder) as (out, path):
        for where, row in rows:
            if isinstance(row, BadField):
                left_out.add(row.at(where))
                continue
            try:
                line = json.dumps([where, row], default=_named_kind)
            except (ValueError, RecursionError):
                bad = BadField("row", "lists within lists without end", "less", "broken row")
                left_out.add(bad.at(where))
                continue
            out.write(line.encode("ascii") + b"\n")
    return RowFile(path, name_of(source), spooled=True, temporary=True)


def _named_kind(value: Any) -> dict[str, str]:
    """A value that JSON has no kind for: where a text is expected it is none."""
    return {type(value).__name__: str(value)}


@contextlib.contextmanager
def _temporary(folder: str | None) -> Iterator[tuple[Any, str]]:
    """(a new file open for writing, its path); it goes where writing it fails."""
    handle, path = tempfile.mkstemp(prefix="dpo-kernels-rows-", suffix=".jsonl", dir=folder)
    try:
        with os.fdopen(handle, "wb") as out:
            yield out, path
    except BaseException:
        os.unlink(path)
        raise


def is_large(source: Source) -> bool:
    """Whether a file or folder has more than is to be read before the first step.

    It is read as far as it takes to say so; of a pipe nothing is.
    """
    if not is_path(source) or str(source) == "-":
        return False
    path = Path(source)
    files = folder_files(path) if path.is_dir() else [path] if path.is_file() else []
    if sum(file.stat().st_size for file in files) > LARGE:
        return True
    size = rows = 0
    for file in files:
        with contextlib.suppress(DataError), opened(str(file)) as raw:
            for some, more in _measured(DataFile(str(file), raw)):
                size, rows = size + some, rows + more
                if size > LARGE or rows > MANY:
                    return True
    return False


def _measured(file: DataFile) -> Iterator[tuple[int, int]]:
    """(bytes, rows) of the parts of a file, one after another."""
    if file.table is not None:
        yield from table_size(file.name)
        return
    quoted = False
    names: tuple[bytes, ...] = (b"\n",)
    if file.delimiter is None and not file.has_lines():  # a list, perhaps
        names = (b'"rejected"', b'"prompt"')
    while block := file.file.read(_BLOCK):
        if file.delimiter is None:
            yield len(block), max(block.count(name) for name in names)
            continue
        parts = block.split(b'"')  # a line break in quotes ends no row
        yield len(block), sum(part.count(b"\n") for part in parts[quoted::2])
        quoted ^= len(parts) % 2 == 0


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
