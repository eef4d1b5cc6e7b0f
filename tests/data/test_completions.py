"""Single completions: the forms of their rows, which turns are scored, what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data import bot, byte_tokenizer, user, write

from dpo_kernels.data import (
    Completion,
    DataError,
    LeftOut,
    Limits,
    PreferencePair,
    RowTokenizer,
    TokenPair,
    TokenSequence,
    read_conversations,
    read_scorable,
    tokenize_conversations,
)

pytest.importorskip("transformers", reason="tokenizers are transformers'")


def scored(rows: list[Any], tmp_path: Path, left_out: LeftOut, length: int | None = None) -> Any:
    """The scored text of each row."""
    tokenizer = byte_tokenizer()
    read = read_conversations(write(tmp_path / "a.jsonl", rows), left_out)
    sequences = tokenize_conversations(read, tokenizer, length, left_out)
    return [tokenizer.decode([s.ids[t] for t in s.scored]) for s in sequences]


def test_forms(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("q"), bot("a")]},
        {"prompt": "Q: hi\nA:", "completion": " yes"},
        {"prompt": [user("hi")], "completion": [bot("c")]},
        {"text": "all of it"},
        {"messages": [bot("first"), user("q"), bot("last")], "tools": None},
        {"messages": [user("q"), bot("a")], "system": "be brief"},
    ]
    left_out = LeftOut()
    assert scored(rows, tmp_path, left_out) == [
        "a</s>",
        " yes</s>",
        "c</s>",
        "ll of it</s>",  # nothing predicts the first token
        "last</s>",  # nothing was asked before the first turn
        "a</s>",
    ]
    assert not left_out.problems


def test_every_turn_of_the_assistant_is_scored(tmp_path: Path) -> None:
    rows = [{"messages": [user("1"), bot("one"), user("2"), bot("two")]}]
    left_out = LeftOut()
    assert scored(rows, tmp_path, left_out) == ["one</s>two</s>"]
    assert any("the assistant's alone scored" in note for note in left_out.notes)
    # A template that rewrites earlier turns: the last turn alone can be told apart.
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.role[0] }}{% if loop.last or m.role == 'user' %}"
        "{{ m.content }}{% endif %}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    read = read_conversations(tmp_path / "a.jsonl", left_out)
    (row,) = tokenize_conversations(read, tokenizer, None, left_out)
    assert tokenizer.decode([row.ids[t] for t in row.scored]) == "two</s>"
    assert any("the last is scored" in note for note in left_out.notes)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": "a"}, "missing field"),
        ({"prompt": "q"}, "missing field"),
        ({"completion": "a"}, "missing field"),
        ({"prompt": [user("q")], "completion": "a"}, "mis-typed field"),
        ({"messages": "q"}, "mis-typed field"),
        ({"messages": [user("q")]}, "last role not assistant"),
        ({"messages": [user("q"), bot(" ")]}, "empty completion"),
        ({"text": " "}, "empty completion"),
        ({"text": "a", "images": ["x"]}, "not supported"),
        ("{", "broken JSON"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used(row: Any, reason: str, tmp_path: Path) -> None:
    left_out = LeftOut()
    file = write(tmp_path / "a.jsonl", [{"text": "good"}, row])
    assert len(read_conversations(file, left_out)) == 1
    assert left_out.counts() == {reason: 1} and left_out.problems[0].where == f"{file}:2"
    with pytest.raises(DataError, match="no usable conversation"):
        read_conversations(write(tmp_path / "b.jsonl", [row]), LeftOut())


def test_columns_of_other_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    (row,) = read_conversations(file, LeftOut(), {"prompt": "question", "completion": "answer"})
    assert (row.prompt, row.completion) == ("q", "a")


def test_lengths_and_limits(tmp_path: Path) -> None:
    rows = [{"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "bcdefgh"}]
    left_out = LeftOut()
    assert scored(rows, tmp_path, left_out, 4) == ["bcd"]
    assert left_out.counts() == {"prompt too long": 1}
    assert left_out.notes["completions cut at max_length=4"] == 1
    row = Completion("a", "b", "x:1")
    maker = RowTokenizer(byte_tokenizer(), None, left_out, print, Limits(vocabulary=5))
    assert maker.of(row) is None and "token id beyond the embedding" in left_out.counts()


def test_pairs_and_completions_in_one_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "completion": "a", "note": 1},
    ]
    left_out = LeftOut(report=print)
    found = list(read_scorable(write(tmp_path / "a.jsonl", rows), left_out))
    assert [type(f) for f in found] == [PreferencePair, Completion]
    maker = RowTokenizer(byte_tokenizer(), None, left_out, print, Limits())
    assert [type(maker.of(f)) for f in found] == [TokenPair, TokenSequence]
