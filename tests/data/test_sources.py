"""Where rows come from, and the forms that other projects write them in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from test_data import bot, user, write
from test_data_faults import CHAT, GOOD, read

from dpo_kernels.data import DataError, LeftOut, read_pairs


def texts(path: Any, **options: Any) -> list[tuple[Any, Any, Any]]:
    left_out = LeftOut()
    pairs = read_pairs(path, left_out, **options)
    assert not left_out.problems
    return [(p.prompt, p.chosen, p.rejected) for p in pairs]


# --- forms ---

PLAIN = ("q", "good", "bad")
TURNS = ([user("q")], [bot("good")], [bot("bad")])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "output_A": "good", "output_B": "bad", "label": 1}, PLAIN),
        ({"prompt": "q", "output_A": "bad", "output_B": "good", "label": 0}, PLAIN),
        ({"prompt": [user("q")], "output_A": "good", "output_B": "bad", "label": "1"}, TURNS),
        ({"prompt": "q", "output_1": "bad", "output_2": "good", "label": 2}, PLAIN),
        ({"prompt": "q", "responses": ["so", "bad", "good"], "rewards": [0.1, -3, 2]}, PLAIN),
        ({"prompt": "q", "completions": ["so", "bad", "good"], "ranks": [2, 3, 1]}, PLAIN),
        (
            {
                "context": [user("q")],
                "completions": [
                    {"rank": 1, "completion": [bot("bad")]},
                    {"rank": 0, "completion": [bot("good")]},
                ],
            },
            TURNS,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            TURNS,
        ),
        ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, TURNS),
        (
            {"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad"},
            ([user("a\nb")], *TURNS[1:]),
        ),
        (  # alignment-handbook
            {
                "prompt": "q",
                "chosen": [user("q"), bot("good")],
                "rejected": [user("q"), bot("bad")],
                "messages": [user("q"), bot("good")],
                "score_chosen": 8.0,
            },
            TURNS,
        ),
    ],
)
def test_forms_of_other_projects(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    assert texts(write(tmp_path / "a.jsonl", [row])) == [expected]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "q", "output_A": "a", "output_B": "b", "label": 0.5}, "label"),
        ({"prompt": "q", "output_A": "a", "output_B": "b"}, "label"),
        ({"prompt": "q", "output_1": "a", "output_2": "b", "label": "tie"}, "label"),
        ({"prompt": "q", "responses": ["a"], "rewards": [1]}, "responses"),
        ({"prompt": "q", "responses": ["a", "b"], "rewards": [1, 1]}, "rewards"),
        ({"prompt": "q", "responses": ["a", "b"], "rewards": [1]}, "rewards"),
        ({"prompt": "q", "responses": ["a", "b"], "rewards": [1, float("nan")]}, "rewards"),
        ({"prompt": "q", "responses": ["a", "b"]}, "responses"),
        ({"prompt": "q", "output": "a", "label": True}, "output"),
        (
            {
                "conversations": [{"from": "martian", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            "conversations[0].from",
        ),
    ],
)
def test_forms_without_a_preference_are_lines(
    tmp_path: Path, row: dict[str, Any], field: str
) -> None:
    pairs, left_out, _ = read(tmp_path, GOOD, row)
    assert len(pairs) == 1 and [p.field for p in left_out.problems] == [field]


def test_columns_are_mapped(tmp_path: Path) -> None:
    row = {"question": "q", "good": "good", "bad": "bad", "sure": 0.5}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "weight": "sure"}
    (pair,) = read_pairs(write(tmp_path / "a.jsonl", [row]), LeftOut(), columns)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.weight) == (*PLAIN, 0.5)
    file = tmp_path / "a.csv"
    file.write_text("question,good,bad,sure\nq,good,bad,0.5\n")
    assert read_pairs(file, LeftOut(), columns)[0].chosen == "good"
    left_out = LeftOut()
    clash = {**row, "prompt": "other"}
    file = write(tmp_path / "b.jsonl", [row, clash])
    assert len(read_pairs(file, left_out, columns)) == 1
    assert left_out.problems[0].reason == "two columns"


def test_columns_of_the_pair(tmp_path: Path) -> None:
    pairs, left_out, said = read(
        tmp_path,
        {**GOOD, "label_smoothing": 0.1, "group": "a"},
        {**GOOD, "group": 3},
        {**GOOD, "label_smoothing": 1},
        {**GOOD, "group": [1]},
    )
    assert [(p.label_smoothing, p.group) for p in pairs] == [(0.1, "a"), (None, "3")]
    assert [p.field for p in left_out.problems] == ["label_smoothing", "group"]
    assert not any("not used" in line for line in said)


# --- folders, tables, objects ---


def test_a_folder_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write(tmp_path / "b.jsonl", [{**GOOD, "prompt": "2"}])
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({**GOOD, "prompt": "1"}).encode())
    )
    (tmp_path / "more" / "c.csv").write_text("prompt,chosen,rejected\n3,b,c\n")
    (tmp_path / "README.md").write_text("not data")
    assert [t[0] for t in texts(tmp_path)] == ["1", "2", "3"]
    write(tmp_path / "train-1.jsonl", [{**GOOD, "prompt": "4"}])
    assert [t[0] for t in texts(tmp_path)] == ["4"]


def test_any_iterable_of_mappings() -> None:
    left_out = LeftOut()
    pairs = read_pairs([GOOD, 3, CHAT], left_out)
    assert [p.source for p in pairs] == ["dataset[0]", "dataset[2]"]
    assert left_out.problems[0].where == "dataset[1]"


def test_names_of_the_hub_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"owner/name does not exist.*(needs datasets|OFFLINE)"):
        read_pairs("owner/name", LeftOut())


ROWS = [
    {**CHAT, "margin": 0.5, "tools": None},
    {**CHAT, "chosen": [{**bot("x"), "tool_calls": [{"function": {"name": "f"}}]}]},
]


def test_parquet_and_arrow(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet")
    for name, new in (("a.arrow", pa.ipc.new_file), ("s.arrow", pa.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
    for name in ("a.parquet", "a.arrow", "s.arrow"):
        file = tmp_path / name
        first, second = read_pairs(file, LeftOut())
        assert (first.source, first.offset, first.tools) == (f"{file}:1", 0.5, None)
        assert first.chosen == CHAT["chosen"]  # no key that the row has not
        assert second.chosen[0]["tool_calls"] == [{"function": {"name": "f"}}]
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="a Parquet file that cannot be read"):
        read_pairs(tmp_path / "a.parquet", LeftOut())


def test_datasets_objects(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    made = datasets.Dataset.from_list([GOOD, GOOD])
    assert texts(made) == [("a", "b", "c")] * 2
    made.save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == [("a", "b", "c")] * 2
    assert texts(made.to_iterable_dataset()) == [("a", "b", "c")] * 2


def test_zstd(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    data = json.dumps(GOOD).encode()
    try:
        import zstandard

        packed = zstandard.ZstdCompressor().compress(data)
    except ImportError:
        pa = pytest.importorskip("pyarrow", reason="zstd needs zstandard or pyarrow")
        packed = pa.compress(data, codec="zstd", asbytes=True)
    file.write_bytes(packed)
    assert texts(file) == [("a", "b", "c")]
    file.write_bytes(packed[:-6])
    with pytest.raises(DataError, match="zstd"):
        read_pairs(file, LeftOut())
