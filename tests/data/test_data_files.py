"""What files of data may look like: packed, foreign, lists, CSV, pipes.

Ids in names and comments are of the public reports that showed the situation.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from test_data import bot
from test_data_faults import GOOD

from dpo_kernels.data import DataError, LeftOut, read_pairs


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl"])
def test_packed_files_are_unpacked(tmp_path: Path, pack: Any, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(pack(b"\n".join(json.dumps(GOOD).encode() for _ in range(3)) + b"\n{"))
    left_out = LeftOut()
    assert [p.source for p in read_pairs(file, left_out)] == [f"{file}:{i}" for i in (1, 2, 3)]
    assert [p.where for p in left_out.problems] == [f"{file}:4"]


def test_a_broken_gzip_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 900)[:-12])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read_pairs(file, LeftOut())


def test_a_byte_order_mark_costs_no_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    left_out = LeftOut()
    assert len(read_pairs(file, left_out)) == 1 and not left_out.problems
    file.write_bytes(file.read_bytes() * 3)  # files with marks, put together
    assert len(read_pairs(file, left_out)) == 3 and not left_out.problems


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PAR1", "Parquet"),
        (b"ARROW1\0\0", "Arrow"),
        (b"\xff\xfe{\0", "UTF-16"),
        (b"PK\x03\x04", "zip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path: Path, head: bytes, what: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(head + b"\n" * 50)
    with pytest.raises(DataError, match=f"{what}.*expected JSONL"):
        read_pairs(file, LeftOut())


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_with_its_lines(tmp_path: Path, indent: int | None) -> None:
    """datasets#6891 among them: one object a line, where only the last parsed as a line."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps([GOOD, 3, {**GOOD, "margin": 1}], indent=indent))
    left_out = LeftOut()
    pairs = read_pairs(file, left_out)
    lines = (1, 1, 1) if indent is None else (2, 7, 8)
    assert [p.source for p in pairs] == [f"{file}:{lines[0]}", f"{file}:{lines[2]}"]
    assert [p.where for p in left_out.problems] == [f"{file}:{lines[1]}"]
    rows = ",\n".join(json.dumps(GOOD) for _ in range(3))
    file.write_text(f"[\n{rows}\n]\n")
    assert [p.source for p in read_pairs(file, left_out)] == [f"{file}:{i}" for i in (2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"a": 1},\n{"a"', 3),
        ("[\n{}\n{}\n]", 3),
        ("[{},]", 1),
        ("[{}]\n{}", 0),
        ("{\n{", 0),
        ("[{}", 1),
        ("[\n{}\n]\n]", 4),
        ("{\n}", 1),
    ],
)
def test_broken_lists_name_the_line(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError, match=f"a.json:{line}: " if line else "no usable"):
        read_pairs(file, LeftOut())


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    chosen = json.dumps([bot("x")]).replace('"', '""')
    file.write_text(
        "prompt,chosen,rejected,margin,id\r\n"
        'a,"two\nlines",c,0.5,1\r\n'
        "a,b,c\r\n"
        "a,b,c,much,2\r\n"
        f'"[{{""role"": ""user"", ""content"": ""q""}}]","{chosen}",'
        f'"{chosen.replace("x", "y")}",,3\r\n'
    )
    left_out = LeftOut()
    first, second = read_pairs(file, left_out)
    assert (first.source, first.chosen, first.offset) == (f"{file}:2", "two\nlines", 0.5)
    assert (second.source, second.chosen) == (f"{file}:6", [bot("x")])
    assert [(p.where, p.field) for p in left_out.problems] == [
        (f"{file}:4", "line"),
        (f"{file}:5", "margin"),
    ]
    file.write_text("question,chosen,rejected,chosen\na,b,c,d\n")
    with pytest.raises(DataError, match="the columns are question, chosen"):
        read_pairs(file, LeftOut())
    file.write_text("prompt,chosen,rejected\na,\"[{'role': 'assistant'}]\",c\n")
    with pytest.raises(DataError, match="messages as JSON"):
        read_pairs(file, LeftOut())


def test_standard_input_and_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps(GOOD).encode() + b"\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_pairs("-", LeftOut())[0].source == "<stdin>:1"
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: fifo.write_bytes(data * 3))
    thread.start()
    assert len(read_pairs(fifo, LeftOut())) == 3
    thread.join()
