"""Completions with a label and ranked lists: forms, what is left out, ids, `data check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_data import bot, byte_tokenizer, user, write

from dpo_kernels.cli import main
from dpo_kernels.data import (
    Completion,
    DataError,
    LeftOut,
    Ranking,
    TokenCompletion,
    TokenRanking,
    read_judged,
    read_pairs,
    tokenize_judged,
)

GOOD = [
    ({"prompt": "Q: ", "completion": "yes", "label": True}, True),
    ({"prompt": "Q: ", "completion": "no", "label": False, "weight": 2}, False),
    ({"prompt": "Q: ", "output": "maybe", "label": 1}, True),  # HALOs
    ({"prompt": [user("q")], "completion": [bot("a")], "label": False}, False),
    ({"prompt": [user("which?")], "completion": "that", "label": 0}, False),
    ({"messages": [user("who asked"), bot("nobody did")], "label": True}, True),
    ({"prompt": [user("why")], "completion": [bot("so")], "label": True, "system": "brief"}, True),
]
BAD = [
    ({"prompt": "a", "completion": "b"}, "label: missing"),
    ({"prompt": "a", "completion": "b", "label": None}, "label: missing"),
    ({"prompt": "a", "completion": "b", "label": "yes"}, "label: 'yes', expected true (good)"),
    ({"prompt": "a", "completion": "b", "label": 2}, "label: 2, expected"),
    ({"prompt": "a", "completion": "b", "label": 0.5}, "label: 0.5, expected"),
    ({"prompt": "a", "completion": "  ", "label": True}, "completion: empty"),
    ({"completion": "b", "label": True}, "prompt: missing"),
    ({"prompt": "a", "completion": [bot("b")], "label": True}, "completion: a list"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen: a preference pair"),
    ({"prompt": "a", "completion": "b", "label": True, "weight": -1}, "weight: -1"),
    ({"prompt": [user("q")], "completion": [user("a")], "label": True}, "last role|'assistant'"),
]


def test_labelled_forms(tmp_path: Path) -> None:
    left_out = LeftOut()
    rows = read_judged(write(tmp_path / "a.jsonl", [r for r, _ in GOOD]), "unpaired", left_out)
    assert not left_out.problems
    assert all(isinstance(row, Completion) for row in rows)
    assert [row.label for row in rows if isinstance(row, Completion)] == [y for _, y in GOOD]
    assert rows[1].weight == 2.0 and rows[6].prompt[0]["role"] == "system"  # type: ignore[index]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_bad_labelled_rows(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    left_out = LeftOut()
    read_judged(write(tmp_path / "a.jsonl", [GOOD[0][0], row]), "unpaired", left_out)
    (problem,) = left_out.problems
    assert problem.where.endswith("a.jsonl:2")
    assert any(word in str(problem) for word in words.split("|")), problem
    with pytest.raises(DataError, match="no usable completion with a label"):
        read_judged(write(tmp_path / "b.jsonl", [row]), "unpaired", LeftOut())


def test_ranked_forms(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2]},
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 3, 1]},
        {"prompt": "p", "completions": [{"text": "x", "score": 0}, {"text": "y", "score": 1}]},
        {
            "context": [user("q")],
            "completions": [{"rank": 1, "completion": "x"}, {"rank": 0, "completion": "y"}],
        },
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 1, 0], "weight": 0.5},
    ]
    left_out = LeftOut()
    read = read_judged(write(tmp_path / "a.jsonl", rows), "ranked", left_out)
    assert not left_out.problems
    found = [
        [c if isinstance(c, str) else c[-1]["content"] for c in row.completions]
        for row in read
        if isinstance(row, Ranking)
    ]
    assert found == [
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["y", "x"],
        ["y", "x"],
        ["b", "a"],
        ["a", "c"],
    ]
    assert read[5].weight == 0.5
    assert sum(left_out.notes.values()) == 1  # of equal scores the first is ranked


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "completions": ["a", "b"]}, "completions without ranks"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}, "scores: all equal"),
        ({"prompt": "p", "completions": ["a", " "], "scores": [1, 2]}, "completions: empty"),
        ({"prompt": "p", "completions": ["a"], "scores": [1]}, "at least two completions"),
        ({"prompt": "p"}, "completions: missing"),
        ({"prompt": "p", "completion": "a", "label": True}, "one completion with a label"),
    ],
)
def test_bad_ranked_rows(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_judged(write(tmp_path / "a.jsonl", [row]), "ranked", LeftOut())


def test_pairs_do_not_take_labelled_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [GOOD[0][0]])
    with pytest.raises(DataError, match="one completion with a label"):
        read_pairs(file, LeftOut())


def test_ids(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="tokenizers are transformers'")
    tokenizer = byte_tokenizer()
    rows = [
        {"prompt": "Q: ", "completion": "yes", "label": True},
        {"prompt": [user("q")], "completion": [bot("long " * 9)], "label": False},
    ]
    left_out = LeftOut()
    read = read_judged(write(tmp_path / "a.jsonl", rows), "unpaired", left_out)
    first, second = tokenize_judged(read, tokenizer, 20, left_out)
    assert isinstance(first, TokenCompletion) and isinstance(second, TokenCompletion)
    assert tokenizer.decode(first.completion) == "yes</s>" and first.desirable
    assert len(second.prompt) + len(second.completion) == 20 and not second.desirable
    lists = [
        {"prompt": "Q: ", "completions": ["yes siree", "no", "yes sir"], "scores": [1, 3, 2]},
        {"prompt": "Q: ", "completions": ["aaaab", "aaaac", "aaaad"], "scores": [1, 3, 2]},
    ]
    read = read_judged(write(tmp_path / "b.jsonl", lists), "ranked", left_out)
    (one,) = tokenize_judged(read, tokenizer, 7, left_out)  # of the other nothing is left to rank
    assert isinstance(one, TokenRanking)
    assert [tokenizer.decode(c) for c in one.completions] == ["no</s>", "yes "]
    assert left_out.problems[-1].reason == "nothing to rank"
    assert any("another's tokens" in note for note in left_out.notes)


def check(*args: Any) -> int:
    return main(["data", "check", *map(str, args)])


def test_data_check_knows_the_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row, _ in GOOD]
    file = write(tmp_path / "a.jsonl", rows)
    assert check(file) == 0
    text = capsys.readouterr().out
    assert "7 usable labelled completions (4 of 7 read are conversational)" in text
    assert "4 good completions, 3 bad ones" in text
    clash = [*rows, {**rows[0], "label": False}, rows[1], BAD[0][0]]
    assert check(write(tmp_path / "b.jsonl", clash), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == "unpaired" and found["left_out"] == {"no label": 1}
    kinds = {f["kind"]: f["text"] for f in found["findings"]}
    assert "labels the other way" in kinds["contradictions"] and "duplicates" in kinds
    assert found["lengths"]["good"] == 4 and found["lengths"]["bad"] == 5


def test_data_check_of_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"p{i}", "completions": ["a", "b", "cc"], "scores": [1, 3, 2]} for i in (1, 2)
    ]
    file = write(tmp_path / "a.jsonl", rows)
    assert check(file, "--rows", "ranked") == 0
    text = capsys.readouterr().out
    assert "2 usable ranked lists" in text and "completions of a list: 2 of 3" in text
    assert check(file) == 0  # as pairs: the best against the worst
    assert "2 usable pairs" in capsys.readouterr().out
    labelled = write(tmp_path / "b.jsonl", [GOOD[0][0]])
    assert check(labelled, "--rows", "pairs") == 1
    assert "one completion with a label" in capsys.readouterr().out
