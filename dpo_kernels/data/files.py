"""Rows of preference data, wherever they are: a file, a folder, a pipe, a `datasets` object.

The content decides, not the name, except for CSV (`.csv`, `.tsv`): a file that begins with `[` is
one JSON list, Parquet and Arrow are known by their first bytes, everything else has one JSON object
a line. gzip, bzip2, xz and zstd are unpacked. `-` is standard input; a folder is all data files
below it, in order of their names; `owner/name`, where no such file is, a data set of the hub. Each
row comes with its place, `file:line`; a broken one comes as a `BadField`.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import forms
from .csv_rows import csv_rows
from .json_rows import json_rows
from .left_out import DAMAGED, BadField, DataError, MissingPackage
from .row import EXPECTED, Row, Rows
from .table_rows import NEEDS, arrow_rows, dataset_rows, parquet_rows

_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"
_TABLES = {b"PAR1": parquet_rows, b"ARROW1": arrow_rows, b"\xff\xff\xff\xff": arrow_rows}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe\x00\x00": "text in UTF-32",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"\x93NUMPY": "a NumPy file",
    b"SQLite": "a database",
}
_STEP = 1 << 16  # bytes that are unpacked at a time
_BOM = b"\xef\xbb\xbf"
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
_PACKINGS = (".gz", ".bz2", ".xz", ".zst")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")

Source = Any  # a path, "-", a name of the hub, or an iterable of mappings


def name_of(source: Source) -> str:
    """What a source is called in messages."""
    if is_path(source):
        name = os.fspath(source)
        return "<stdin>" if name == "-" else name
    return f"<{type(source).__name__}>"


def is_path(source: Source) -> bool:
    return isinstance(source, str | os.PathLike)


def read_rows(source: Source, columns: Mapping[str, str] | None = None) -> Rows:
    """(place, row or what is wrong with it) of each row; `DataError` if there is no reading it.

    `columns`: our name -> the name that the data has.
    """
    rename = {theirs: ours for ours, theirs in (columns or {}).items()}
    found = _files(os.fspath(source), rename) if is_path(source) else dataset_rows(source)
    if not rename:
        yield from found
        return
    for where, row in found:
        yield where, renamed(row, rename)


def renamed(row: Row | BadField, rename: Mapping[str, str]) -> Row | BadField:
    """The row under our names; `rename`: theirs -> ours."""
    if isinstance(row, BadField) or not rename:
        return row
    result: Row = {}
    for name, value in row.items():
        ours = rename.get(name, name)
        if ours in result or (ours != name and ours in row and ours not in rename):
            return BadField(
                ours,
                f"two columns of that name ({name!r} is mapped to it)",
                "one (take the other out, or map it to another name)",
                "two columns",
            )
        result[ours] = value
    return result


def _files(name: str, rename: Mapping[str, str]) -> Rows:
    path = Path(name)
    if name != "-" and path.is_dir():
        files = folder_files(path)
        if not files:
            raise DataError(
                f"{path} is a folder without data files ({', '.join(_SUFFIXES)}), expected a JSONL "
                "file (one JSON object a line)"
            )
        yield from _all_rows(files, rename)
    elif name != "-" and not path.exists() and _hub_name(name):
        from .hub import hub_dataset

        yield from dataset_rows(hub_dataset(name))
    else:
        yield from _file_rows(name, rename)


def _all_rows(files: list[Path], rename: Mapping[str, str]) -> Rows:
    """The rows of a folder's files; one that cannot be read costs itself, unless none can.

    For want of a package none is left out: it can be installed.
    """
    refused: list[tuple[str, DataError]] = []
    for file in files:
        try:
            yield from _file_rows(str(file), rename)
        except MissingPackage:
            raise
        except DataError as error:
            refused.append((str(file), error))
    if len(refused) == len(files):
        raise refused[0][1]
    for name, why in refused:
        said = str(why).removesuffix(f", expected {EXPECTED}")
        place = re.match(rf"{re.escape(name)}(:\d+)?:? ?", said)
        if place is not None:
            said = said[place.end() :]
        line = (place and place[1]) or ""
        yield name + line, BadField("file", said, EXPECTED, DAMAGED)


def _hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not _stem(
        Path(name)
    ).suffix.lower().endswith(_SUFFIXES)


def folder_files(folder: Path) -> list[Path]:
    """The data files of a folder; of one with a part called `train`, those of that part."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _stem(path).suffix.lower() in _SUFFIXES
        and not path.name.startswith((".", "dataset_info", "dataset_dict", "state."))
    ]
    train = [f for f in files if f.relative_to(folder).parts[0].lower().startswith("train")]
    return train or files


def _stem(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in _PACKINGS else path


def _file_rows(name: str, rename: Mapping[str, str]) -> Rows:
    with opened(name) as raw:
        yield from DataFile(name, raw).rows(rename)


class DataFile:
    """One file, open past its packing and its byte order mark."""

    def __init__(self, name: str, raw: io.BufferedReader) -> None:
        self.name, self.shown, self._raw = name, name_of(name), raw
        self._suffix = _stem(Path(name)).suffix.lower()
        self._patient = _Patient(raw)
        self.file, self._head = _unpacked(self.shown, raw, self._patient)

    @property
    def packed(self) -> bool:
        """Whether its bytes cannot be gone back to: it is packed, or a pipe."""
        return self.file is not self._raw or not Path(self.name).is_file()

    @property
    def table(self) -> Callable[[str, Any], Rows] | None:
        """What reads it if it is a table of typed columns."""
        found = (read for magic, read in _TABLES.items() if self._head.startswith(magic))
        return next(found, None)

    def has_lines(self) -> bool:
        """Whether it is JSON, one object a line."""
        if self.table is not None or self.delimiter is not None:
            return False
        head = self.file.peek(1).lstrip()  # what is buffered, and no byte is taken
        return head.startswith(b"{") and head.split(b"\n", 1)[0].rstrip() != b"{"

    @property
    def delimiter(self) -> str | None:
        """Between the cells of a CSV file."""
        return {".csv": ",", ".tsv": "\t"}.get(self._suffix)

    def damage(self) -> BadField | None:
        """What was wrong where a packed file that was read as bytes has ended."""
        error = self._patient.error
        if error is None:
            return None
        said = str(error) if isinstance(error, DataError) else self._unread(error)
        return self._behind(said)

    def rows(self, rename: Mapping[str, str]) -> Rows:
        """Its rows; of a damaged file those that are whole, and where it is damaged."""
        last = None
        try:
            for where, row in self._whole(rename):
                last = last if isinstance(row, BadField) else where
                yield where, row
        except MissingPackage:
            raise
        except (*_BROKEN, DataError) as error:
            said = str(error) if isinstance(error, DataError) else self._unread(error)
            if last is None:
                raise DataError(said) from None
            yield last, self._behind(said)

    def _unread(self, error: Exception) -> str:
        return f"{self.shown} cannot be read to its end: {str(error) or type(error).__name__}"

    def _behind(self, said: str) -> BadField:
        said = said.removeprefix(self.shown).lstrip(": ").removesuffix(f", expected {EXPECTED}")
        return BadField("file", f"damaged behind this row ({said})", "a whole file", DAMAGED)

    def _whole(self, rename: Mapping[str, str]) -> Rows:
        table, delimiter = self.table, self.delimiter
        if table is not None:
            yield from table(self.shown, self.file if self.packed else self.name)
        elif delimiter is not None:
            rows = csv_rows(
                self.shown, self.file, delimiter, lambda header: forms.named(header, rename)
            )
            yield from _but_the_last(rows, self._patient)
        else:
            yield from json_rows(self.shown, self.file)
        if self._patient.error is not None:
            raise self._patient.error


def _but_the_last(rows: Rows, patient: _Patient) -> Rows:
    """Of a file that was cut off the last row may be a part, and nothing in it would say so."""
    held = None
    for item in rows:
        if held is not None:
            yield held
        held = item
    if held is not None and patient.error is not None:
        held = held[0], BadField("line", "cut off, perhaps", "a whole row", "broken CSV")
    if held is not None:
        yield held


def opened(name: str) -> io.BufferedReader:
    """The file, or standard input for `-`; `DataError` where there is none."""
    if name == "-":
        stream = getattr(sys.stdin, "buffer", None)
        if stream is None:
            raise DataError("standard input (-) is closed")
        return stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    path = Path(name)
    if path.is_dir() or not path.exists():  # a pipe, as of `<(...)`, exists and is no plain file
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}, expected a JSONL file (one JSON object a line)")
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from None


class _Patient(io.RawIOBase):
    """A packed stream that ends where it is damaged; `error` is what was wrong there.

    It is read in small steps: of the one in which the damage is, pyarrow's zstd gives nothing.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        if self.error is None:
            try:
                data = self.file.read1(min(len(buffer), _STEP))
            except (*_BROKEN, DataError) as error:
                self.error = error
        buffer[: len(data)] = data
        return len(data)


def _unpacked(shown: str, raw: io.BufferedReader, patient: _Patient) -> tuple[Any, bytes]:
    """The stream past its packing and its byte order mark, and its first bytes."""
    file: Any = raw
    head = file.peek(8)
    for magic, unpack in _PACKED.items():
        if head.startswith(magic):
            file = unpack(file)
            break
    if head.startswith(_ZSTD):
        file = io.BufferedReader(_Zstd(shown, file))
    if file is not raw:
        patient.file = file
        file = io.BufferedReader(patient, _STEP)
        head = file.peek(8)
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{shown} is {what}, expected {EXPECTED}")
    if head.startswith(_BOM):
        file.read(len(_BOM))
    return file, head


class _Zstd(io.RawIOBase):
    """Reads a zstd stream with what is there: Python 3.14's own, zstandard, or pyarrow."""

    def __init__(self, shown: str, file: Any) -> None:
        self._shown, self._stream = shown, _zstd_reader(file)
        if self._stream is None:
            raise MissingPackage(
                f"{shown} is packed with zstd, which needs zstandard ({NEEDS}); else expected "
                f"{EXPECTED}"
            )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:  # an error type of each library's own
            raise DataError(
                f"{self._shown} is packed with zstd and cannot be read to its end ({error}), "
                f"expected {EXPECTED}"
            ) from None
        buffer[: len(data)] = data
        return len(data)


class _Frames:
    """zstandard's frames one after another; its own reader takes a cut one for whole."""

    def __init__(self, zstandard: Any, file: Any) -> None:
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file, self._ready = file, b""
        self._frame: Any = None

    def read(self, size: int) -> bytes:
        while not self._ready:
            packed = self._file.read(1 << 16)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the packed data ends within a frame")
                return b""
            while packed:
                self._frame = self._frame or self._new()
                self._ready += self._frame.decompress(packed)
                packed = b""
                if self._frame.eof:
                    packed, self._frame = self._frame.unused_data, None
        found, self._ready = self._ready[:size], self._ready[size:]
        return found


def _zstd_reader(file: Any) -> Any:
    with contextlib.suppress(ImportError):
        from compression import zstd  # type: ignore[import-not-found]

        return zstd.open(file)
    with contextlib.suppress(ImportError):
        import zstandard

        return _Frames(zstandard, file)
    with contextlib.suppress(ImportError):
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return None
