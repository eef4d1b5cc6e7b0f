"""Rows of Parquet and Arrow files, and of `datasets` objects: typed columns, read in parts.

They need pyarrow (the extra `data`). A file is never in memory whole: Parquet comes by row groups,
Arrow from a memory map. Places count rows from 1.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from .left_out import DAMAGED, BadField, DataError, MissingPackage
from .row import EXPECTED, Row, Rows, kind_of

NEEDS = "pip install 'dpo-kernels[data]'"
BATCH = 1024  # rows turned into Python objects at a time


def parquet_rows(shown: str, file: Any) -> Rows:
    """The rows of a Parquet file; `file` is open, or a path."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingPackage(
            f"{shown} is a Parquet file, which needs pyarrow ({NEEDS}); else expected {EXPECTED}"
        ) from None
    try:
        source = parquet.ParquetFile(_seekable(file), memory_map=isinstance(file, str | Path))
        yield from _row_groups(shown, source)
    except DataError:
        raise
    except Exception as error:  # pyarrow's errors have no common base but this
        raise _broken(shown, "a Parquet file", error) from None


def arrow_rows(shown: str, file: Any) -> Rows:
    """The rows of an Arrow file or stream (what `save_to_disk` of `datasets` writes)."""
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingPackage(
            f"{shown} is an Arrow file, which needs pyarrow ({NEEDS}); else expected {EXPECTED}"
        ) from None
    try:
        source = pa.memory_map(str(file)) if isinstance(file, str | Path) else _seekable(file)
        try:
            reader = pa.ipc.open_file(source)
            batches: Iterable[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            # A file that lost its end is a stream behind its first eight bytes.
            source.seek(8 if source.read(6) == b"ARROW1" else 0)
            batches = pa.ipc.open_stream(source)
        yield from _rows(shown, batches)
    except DataError:
        raise
    except Exception as error:
        raise _broken(shown, "an Arrow file", error) from None


def table_size(path: str) -> Iterator[tuple[int, int]]:
    """(bytes, rows) of the parts of a Parquet or Arrow file; nothing where they are not told."""
    try:
        import pyarrow as pa
        from pyarrow import parquet

        with open(path, "rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        if is_parquet:
            told = parquet.ParquetFile(path).metadata
            groups = [told.row_group(i) for i in range(told.num_row_groups)]
            yield sum(group.total_byte_size for group in groups), told.num_rows
            return
        batches = pa.ipc.open_file(pa.memory_map(path))
        for i in range(batches.num_record_batches):
            batch = batches.get_batch(i)
            yield batch.nbytes, batch.num_rows
    except Exception:  # what cannot be read is said when it is read
        return


def dataset_rows(dataset: Iterable[Any]) -> Rows:
    """The rows of a `datasets` object, or of any iterable of mappings."""
    for i, row in enumerate(dataset):
        where = f"dataset[{i}]"
        if not hasattr(row, "keys"):
            yield where, BadField("row", kind_of(row), "a mapping", "broken row")
        else:
            yield where, {name: _plain(row[name]) for name in row.keys()}  # noqa: SIM118


def _row_groups(shown: str, source: Any) -> Iterator[tuple[str, Row | BadField]]:
    """The rows of a Parquet file; of a group that is damaged those before the damage."""
    number = 0
    for group in range(source.num_row_groups):
        behind = number + source.metadata.row_group(group).num_rows
        try:
            batches = source.iter_batches(batch_size=BATCH, row_groups=[group])
            for where, row in _rows(shown, batches, number):
                number += 1
                yield where, row
        except DataError:
            raise
        except Exception as error:  # pyarrow's errors have no common base but this
            if number == 0 and source.num_row_groups == 1:
                raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            got = f"rows {number + 1:,} to {behind:,} damaged ({said})"
            yield f"{shown}:{number + 1}", BadField("row", got, "a whole file", DAMAGED)
        number = behind


def _seekable(file: Any) -> Any:
    if isinstance(file, str | Path):
        return str(file)
    return file if file.seekable() else io.BytesIO(file.read())


def _broken(shown: str, what: str, error: Exception) -> DataError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{shown} is {what} that cannot be read ({said}), expected {EXPECTED}")


def _rows(
    shown: str, batches: Iterable[Any], number: int = 0
) -> Iterator[tuple[str, Row | BadField]]:
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):  # of which the last would win without a word
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{shown}: two columns are called {twice!r}, expected each name once")
        for start in range(0, batch.num_rows, BATCH):
            part = batch.slice(start, BATCH)
            try:
                rows: list[Any] = part.to_pylist()
            except Exception:  # one value that does not decode: the others are kept
                rows = [_one(part, i) for i in range(part.num_rows)]
            for row in rows:
                number += 1
                where = f"{shown}:{number}"
                yield (
                    where,
                    row
                    if isinstance(row, BadField)
                    else {name: _plain(value) for name, value in row.items()},
                )


def _one(part: Any, i: int) -> Any:
    try:
        return part.slice(i, 1).to_pylist()[0]
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return BadField("row", f"undecodable values ({said})", "text in UTF-8", "broken row")


def _plain(value: Any, within: bool = False) -> Any:
    """A value as JSON would have given it. Typed columns hold keys that a row has not, as nulls.

    `within`: of a message, say, in which dates and the like are texts; as a column of its own such
    a kind is kept, to be told by its name where a text was expected.
    """
    if isinstance(value, dict):
        return {k: _plain(v, True) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v, True) for v in value]
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), within)
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if within else value
