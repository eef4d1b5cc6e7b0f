"""Rows to a file as they come: JSONL, or Parquet by the file's ending.

The file appears under its name when it is whole; until then it is `NAME.part`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from .config_files import UserError

ENDINGS = (".jsonl", ".parquet")


class TableWriter:
    """Rows that are dicts of numbers, texts and lists of numbers; a context."""

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        if path.suffix not in ENDINGS:
            raise UserError(f"{path} must end in {' or '.join(ENDINGS)}")
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"{path} exists; choose another file or pass --overwrite")
        parent = path.absolute().parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"{path}: {parent} is no folder that can be written to")
        if path.suffix == ".parquet":
            _pyarrow()
        self._writer: Any = None
        self._file: Any = None

    def __enter__(self) -> TableWriter:
        return self

    def write(self, rows: list[dict[str, Any]]) -> None:
        try:
            if self.path.suffix == ".parquet":
                self._write_parquet(rows)
            else:
                if self._file is None:
                    self._file = self.part.open("w", encoding="utf-8")
                for row in rows:
                    self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def _write_parquet(self, rows: list[dict[str, Any]]) -> None:
        pa, parquet = _pyarrow()
        if self._writer is None:
            values = {name: value for row in rows for name, value in row.items()}
            schema = pa.schema([(name, _kind(pa, value)) for name, value in values.items()])
            self._file = self.part.open("wb")
            self._writer = parquet.ParquetWriter(self._file, schema)
        known = set(self._writer.schema.names)
        for row in rows:
            if more := row.keys() - known:
                raise UserError(
                    f"{self.path}: rows of two kinds make no table: {', '.join(sorted(more))} came "
                    "after rows without; write JSONL"
                )
        self._writer.write_table(pa.Table.from_pylist(rows, self._writer.schema))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()
        if kind is None:
            self.part.replace(self.path)
        elif self.part.exists() and not issubclass(kind, KeyboardInterrupt):
            self.part.unlink()  # of a run that was stopped, what there is stays


def _kind(pa: Any, value: Any) -> Any:
    if isinstance(value, list):
        return pa.list_(_kind(pa, value[0]))
    return {str: pa.string(), int: pa.int64(), float: pa.float64()}[type(value)]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "Parquet needs the package pyarrow: pip install 'dpo-kernels[data]', or write .jsonl"
        ) from None
    return pyarrow, parquet
