"""Files larger than memory: rows by number, and pairs that are read when they are asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data import byte_tokenizer, write
from test_data_faults import GOOD

from dpo_kernels.data import (
    LeftOut,
    NoUsableRow,
    PairReader,
    PairTokenizer,
    StreamedPairs,
    read_pairs,
    row_file,
    tokenize_pairs,
)
from dpo_kernels.data.left_out import BadField


def streamed(file: Any, left_out: LeftOut, columns: Any = None, **options: Any) -> StreamedPairs:
    rows = row_file(file, left_out, columns)
    tokenizer = PairTokenizer(byte_tokenizer(), None, left_out)
    return StreamedPairs(rows, np.arange(len(rows)), PairReader(left_out), tokenizer, **options)


def rows_of(n: int) -> list[dict[str, str]]:
    return [{**GOOD, "prompt": f"q{i}", "chosen": f"a{i}"} for i in range(n)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_the_pairs_are_those_of_the_whole_file(tmp_path: Path, end: str, last: bool) -> None:
    lines = [json.dumps(r) for r in rows_of(7)]
    lines[2:2] = ["", "  " if end == "\n" else ""]
    file = tmp_path / "a.jsonl"
    file.write_bytes((end.join(lines) + (end if last else "")).encode())
    expected = tokenize_pairs(read_pairs(file, LeftOut()), byte_tokenizer(), None, LeftOut())
    left_out = LeftOut()
    pairs = streamed(file, left_out)
    assert len(pairs) == 7 and not left_out.problems
    assert list(pairs) == expected and pairs[2:4] == expected[2:4] and pairs[-1] == expected[-1]


@pytest.mark.parametrize("kind", ["gzip", "list", "csv", "mapped", "objects"])
def test_what_is_no_plain_file_is_unpacked_first(tmp_path: Path, kind: str) -> None:
    rows, columns = rows_of(4), None
    text = "\n".join(map(json.dumps, rows))
    file: Any = tmp_path / {"csv": "a.csv", "gzip": "a.jsonl.gz"}.get(kind, "a.jsonl")
    if kind == "gzip":
        file.write_bytes(gzip.compress(text.encode()))
    elif kind == "list":
        file.write_text(json.dumps(rows))
    elif kind == "csv":
        lines = [",".join(GOOD), *(",".join(r.values()) for r in rows)]
        file.write_text("\n".join(lines))
    elif kind == "mapped":
        file.write_text(text.replace('"prompt"', '"question"'))
        columns = {"prompt": "question"}
    else:
        file = rows
    left_out = LeftOut()
    expected = read_pairs(file, LeftOut(), columns)
    pairs = streamed(file, left_out, columns)
    assert [p.source for p in pairs] == [p.source for p in expected]
    if kind == "mapped":  # a plain file all the same
        assert pairs.file._path is None
        return
    spool = Path(pairs.file._path or "")
    assert spool.is_file()
    pairs.file.close()
    assert not spool.exists()


def test_a_bad_row_is_left_out_as_it_is_met(tmp_path: Path) -> None:
    """The next usable one stands in its place; it is said and counted once."""
    lines = [json.dumps(r) for r in rows_of(4)]
    lines[1] = "{"
    lines[3] = json.dumps({**GOOD, "chosen": "c"})
    left_out = LeftOut()
    pairs = streamed(write(tmp_path / "a.jsonl", lines), left_out)
    assert not left_out.problems
    assert pairs.text(1) is None and pairs.text(3) is None  # a look at the first rows
    sources = [pairs[i].source.rpartition(":")[2] for i in (0, 1, 2, 3, 1)]
    assert sources == ["1", "3", "3", "1", "3"]
    assert left_out.counts() == {"broken JSON": 1, "chosen equals rejected": 1}

    def never(pair: Any) -> None:
        raise BadField("margin", "missing", "a margin", "missing field")

    left_out = LeftOut()
    with pytest.raises(NoUsableRow, match="no pair is left; left out: 4"):
        streamed(write(tmp_path / "a.jsonl", lines), left_out, check=never)[0]


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_kernels.data import stream

    monkeypatch.setattr(stream, "KEPT", 3)
    pairs = streamed(write(tmp_path / "a.jsonl", rows_of(9)), LeftOut())
    assert [p.source for p in pairs] and len(pairs._kept) == 3
