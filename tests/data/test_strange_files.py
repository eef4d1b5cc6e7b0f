"""Files that nobody meant to write: other types than were asked for, endless texts, cut packings.

Each row costs itself alone, in one line; the same when the file is read at once and streamed.
"""

from __future__ import annotations

import datetime
import gzip
import json
import random
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from test_data import bot, write
from test_data_faults import CHAT, GOOD, read

from dpo_kernels.cli import main
from dpo_kernels.data import (
    DataError,
    LeftOut,
    PairReader,
    is_large,
    json_rows,
    read_pairs,
    row_file,
)
from dpo_kernels.data import stream as streaming
from dpo_kernels.data.left_out import LONGEST, SHOWN, listed
from dpo_kernels.data.table_rows import _plain

SAYS = {"from": "gpt", "value": "a"}
HUGE = "1" + "0" * 400


def streamed(source: Any, columns: Any = None) -> tuple[list[Any], LeftOut]:
    """The pairs of a source, by number."""
    left_out = LeftOut()
    rows = row_file(source, left_out, columns)
    reader = PairReader(left_out)
    found = (reader.pair(row, where) for where, row in map(rows.row, range(len(rows))))
    pairs = [pair for pair in found if pair is not None]
    rows.close()
    return pairs, left_out


def both(path: Path) -> tuple[list[Any], LeftOut]:
    """Read at once and streamed: the same pairs, and as many rows left out of each kind."""
    left_out = LeftOut()
    pairs = read_pairs(path, left_out)
    others, theirs = streamed(path)
    assert others == pairs
    assert theirs.counts() == left_out.counts()
    return pairs, left_out


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"instruction": "", "input": "", "history": 5, "chosen": "b", "rejected": "c"}, "history"),
        (
            {"conversations": [{"from": ["x"], "value": "q"}], "chosen": SAYS, "rejected": SAYS},
            "conversations[0].from",
        ),
        (
            {"conversations": [{"from": {}, "value": "q"}], "chosen": SAYS, "rejected": SAYS},
            "conversations[0].from",
        ),
        (f'{{"prompt": "q", "responses": ["a", "b"], "rewards": [1, {HUGE}]}}', "rewards"),
        (f'{{"prompt": "q", "responses": ["a", "b"], "ranks": [{HUGE}, 1]}}', "ranks"),
        (f'{{"prompt": "q", "chosen": "a", "rejected": "b", "weight": {HUGE}}}', "weight"),
    ],
)
def test_types_that_no_form_has(tmp_path: Path, row: Any, field: str) -> None:
    """They ended in a TypeError or OverflowError."""
    pairs, left_out, _ = read(tmp_path, GOOD, row)
    assert len(pairs) == 1 and [p.field for p in left_out.problems] == [field]


def test_what_the_data_say_is_one_line_of_an_end(tmp_path: Path) -> None:
    columns = {f"column {i} {'z' * 200}": 1 for i in range(SHOWN + 5)}
    role = {"role": "a\n\x1b[31mb" + "r" * 5000, "content": "q"}
    pairs, left_out, said = read(
        tmp_path, {**GOOD, **columns}, {**CHAT, "prompt": [role]}, {"x" * 9000: "y"}
    )
    assert len(pairs) == 1 and len(left_out.problems) == 2
    for text in (*said, *map(str, left_out.problems)):
        assert len(text) < 4000 and "\n" not in text and "\x1b" not in text
    assert max(len(p.got) for p in left_out.problems) <= LONGEST + 3
    assert any("and 6 more" in text for text in said)
    assert listed(["a\nb"]) == "a b"
    file = tmp_path / "a.csv"
    file.write_text("no header, " + "x" * 9000 + "\na,b\n")
    with pytest.raises(DataError) as error:
        read_pairs(file, LeftOut())
    assert len(str(error.value)) < 600


def test_a_file_of_a_folder_costs_itself(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "b.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:9])
    write(tmp_path / "d.jsonl", [{**GOOD, "prompt": "d"}])
    pairs, left_out = both(tmp_path)
    assert [p.prompt for p in pairs] == ["a", "d"]
    assert {Path(p.where).name for p in left_out.problems} == {"b.jsonl", "c.jsonl.gz"}
    assert "UTF-16" in str(left_out.problems[0])
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "2 damaged file" in capsys.readouterr().out
    (tmp_path / "e.json").write_text('{\n "a": 1}')
    left_out = LeftOut()
    assert len(read_pairs(tmp_path, left_out)) == 2
    assert str(left_out.problems[-1]).startswith(f"{tmp_path / 'e.json'}:1: file: one JSON object")
    for name in ("a.jsonl", "c.jsonl.gz", "d.jsonl", "e.json"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="UTF-16"):
        read_pairs(tmp_path, LeftOut())


def test_for_want_of_a_package_no_file_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs pyarrow"):
        read_pairs(tmp_path, LeftOut())


# --- lists ---


def listed_rows(text: bytes, tmp_path: Path) -> tuple[list[Any], list[str]]:
    file = tmp_path / "a.json"
    file.write_bytes(text)
    pairs, left_out = both(file)
    return [p.prompt for p in pairs], [p.where.rpartition(":")[2] for p in left_out.problems]


@pytest.mark.parametrize("block", [1 << 20, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_in_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    """Wherever a window ends, the rows and their lines are those of the whole."""
    draw = random.Random(3)
    texts = [
        "é" * n + "\u2028😀\\" + "]}{[," * (n % 3) for n in (draw.randrange(9) for _ in range(40))
    ]
    rows = [{**GOOD, "prompt": text, "weight": 1.25, "tools": None} for text in texts]
    rows.insert(7, 3)  # type: ignore[arg-type]
    rows.insert(20, {**GOOD, "chosen": ""})
    plain = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    monkeypatch.setattr(json_rows, "BLOCK", 1 << 30)
    expected = listed_rows(plain, tmp_path)
    assert len(expected[0]) == 40 and len(expected[1]) == 2
    monkeypatch.setattr(json_rows, "BLOCK", block)
    assert listed_rows(plain, tmp_path) == expected
    assert listed_rows(b"\n\n" + plain + b"\n", tmp_path)[0] == expected[0]


@pytest.mark.parametrize("block", [1 << 20, 16])
def test_a_broken_list_in_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """A key that comes twice in an element that is broken behind it was a traceback."""
    monkeypatch.setattr(json_rows, "BLOCK", block)
    good = [json.dumps({**GOOD, "prompt": str(i)}) for i in range(5)]
    twice = '{"prompt": {"b": 1, "b": 2}, oops}'
    again = '{"prompt": "a", "chosen": {"x": 1, "x": 2}, "rejected": "c"}'
    lines = ["[" + good[0], twice, good[1], again, good[2], good[3][:-4], good[4] + "]"]
    prompts, bad = listed_rows(",\n".join(lines).encode(), tmp_path)
    assert prompts == ["0", "1", "2", "4"] and bad == ["2", "4", "6"]
    prompts, bad = listed_rows(",\n".join(lines[:3]).encode(), tmp_path)
    assert prompts == ["0", "1"] and bad == ["2", "3"]


def test_a_line_that_begins_with_a_bracket(tmp_path: Path) -> None:
    pairs, left_out, _ = read(tmp_path, [1, 2], GOOD, "", GOOD)
    assert len(pairs) == 2 and left_out.problems[0].where.endswith(":1")


# --- typed columns ---


def test_values_of_typed_columns(tmp_path: Path) -> None:
    """Within a message they are what JSON would hold; where a text was expected they are named."""
    when = datetime.datetime(2020, 1, 2)
    assert _plain([{"at": when, "no": None}]) == [{"at": "2020-01-02 00:00:00"}]
    assert _plain(Decimal("0.5")) == 0.5 and _plain(when) is when
    dated = {**CHAT, "chosen": [{**bot("x"), "at": when}]}
    rows = [
        dated,
        {**GOOD, "chosen": when},
        {**GOOD, "weight": Decimal("0.25")},
        {**GOOD, "z": when},
    ]
    left_out = LeftOut()
    pairs = read_pairs(rows, left_out)
    assert [p.weight for p in pairs] == [None, 0.25, None]
    assert [(p.field, p.got) for p in left_out.problems] == [("chosen", "datetime")]
    others, theirs = streamed(rows)
    assert [p.weight for p in others] == [None, 0.25, None]
    assert [(p.field, p.got) for p in theirs.problems] == [("chosen", "an object")]
    pairs = read_pairs([{**CHAT, "tools": [{"name": "f", "x": {1, 2}}]}, GOOD], left_out)
    assert len(pairs) == 2  # a set is written as a text


def test_tables_of_other_types(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    when = pa.array([datetime.datetime(2020, 1, 1)] * 2)
    texts = {name: pa.array([f"{name} {i}" for i in range(2)]) for name in GOOD}
    for column in (pa.array([1, 2]), when, pa.array([[1], [2]])):
        parquet.write_table(pa.table({**texts, "chosen": column}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="no usable preference pair; left out: 2"):
            read_pairs(tmp_path / "a.parquet", LeftOut())
    twice = pa.Table.from_arrays([texts["prompt"], *texts.values()], ["prompt", *texts])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns are called 'prompt'"):
        read_pairs(tmp_path / "a.parquet", LeftOut())
    numbers = pa.array([Decimal("0.5"), Decimal("2")])
    parquet.write_table(pa.table({**texts, "weight": numbers}), tmp_path / "a.parquet")
    assert [p.weight for p in both(tmp_path / "a.parquet")[0]] == [0.5, 2.0]


# --- larger than memory ---


@pytest.mark.parametrize("kind", ["jsonl", "gz", "bom", "mapped", "list", "csv", "folder"])
def test_many_rows_are_not_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By their number or their size unpacked, however they are packed."""
    rows = [{**GOOD, "prompt": f"q{i}\nand more"} for i in range(30)]
    text = "\n".join(map(json.dumps, rows)).encode()
    name = {"gz": "a.jsonl.gz", "csv": "a.csv", "list": "a.json"}.get(kind, "a.jsonl")
    file, columns = tmp_path / name, None
    if kind == "gz":
        text = gzip.compress(text)
    elif kind == "bom":
        text = b"\xef\xbb\xbf" + text
    elif kind == "mapped":
        text, columns = text.replace(b'"prompt"', b'"question"'), {"prompt": "question"}
    elif kind == "list":
        text = json.dumps(rows, indent=2).encode()
    elif kind == "csv":
        cells = ('"' + row["prompt"] + '",b,c' for row in rows)
        text = "\n".join(["prompt,chosen,rejected", *cells]).encode()
    file.write_bytes(text)
    source: Any = file
    if kind == "folder":
        source = tmp_path / "all"
        (source / "more").mkdir(parents=True)
        file.rename(source / "more" / "a.jsonl")
    assert not is_large(source) and not is_large("-") and not is_large(tmp_path / "none")
    expected = read_pairs(source, LeftOut(), columns)
    assert len(expected) == 30 and streamed(source, columns)[0] == expected
    monkeypatch.setattr(streaming, "MANY", 31)
    assert not is_large(source)
    monkeypatch.setattr(streaming, "MANY", 28)
    assert is_large(source)
    monkeypatch.setattr(streaming, "MANY", 1000)
    monkeypatch.setattr(streaming, "LARGE", len(text) // 2 if kind != "gz" else 1500)
    assert is_large(source)


def test_tables_tell_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    table = pa.Table.from_pylist([GOOD] * 30)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        monkeypatch.setattr(streaming, "MANY", 30)
        assert not is_large(tmp_path / name)
        monkeypatch.setattr(streaming, "MANY", 29)
        assert is_large(tmp_path / name)


def test_a_packed_file_that_is_cut_is_streamed_to_its_end(tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [{**GOOD, "prompt": draw.randbytes(400).hex()} for _ in range(200)]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(packed[: len(packed) // 2])
    pairs, left_out = streamed(file)
    assert 80 < len(pairs) < 120 and left_out.problems[0].reason == "damaged file"
    assert [p.prompt for p in pairs] == [row["prompt"] for row in rows[: len(pairs)]]


def test_a_cut_zstd_is_read_to_its_end(tmp_path: Path) -> None:
    """In large steps pyarrow loses what lies before the damage."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    draw = random.Random(2)
    rows = [{**GOOD, "prompt": draw.randbytes(300).hex()} for _ in range(1500)]
    for text in ("\n".join(map(json.dumps, rows)), json.dumps(rows)):
        packed = pa.compress(text.encode(), codec="zstd", asbytes=True)
        file = tmp_path / "a.jsonl.zst"
        file.write_bytes(packed[:-4])
        pairs, left_out = both(file)
        assert 1200 < len(pairs) < 1500 and "damaged file" in left_out.counts()


def test_nothing_is_left_of_a_file_that_cannot_be_unpacked(tmp_path: Path) -> None:
    def broken() -> Any:
        yield GOOD
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        row_file(broken(), LeftOut(), None, folder=str(tmp_path))
    assert not list(tmp_path.iterdir())
