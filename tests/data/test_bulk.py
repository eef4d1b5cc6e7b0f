"""Many pairs: the same ids in several processes and from the disk as one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_data import bot, byte_tokenizer, user

from dpo_kernels.data import LeftOut, PreferencePair, bulk, tokenize_many, tokenize_pairs


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "LONG", 8)
    monkeypatch.setattr(bulk, "CHUNK", 3)


def pairs() -> list[PreferencePair]:
    turns = [bot("a"), user("why"), bot("so")]
    several = PreferencePair([user("q")], turns, [*turns[:-1], bot("no")], "f:0", weight=0.5)
    plain = [
        PreferencePair(f"q{i}", f" a{i}", f" b{i}", f"f:{i}", i * 1.0, group=str(i % 2))
        for i in range(1, 12)
    ]
    return [several, *plain, PreferencePair("x" * 90, "a", "b", "f:12")]


def run(made: list[PreferencePair], **options: Any) -> tuple[Any, Any, Any]:
    left_out = LeftOut()
    found = tokenize_many(made, byte_tokenizer(), 60, left_out, pytest.fail, **options)
    return found, left_out.problems, dict(left_out.notes)


def test_processes_and_cache_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out = LeftOut()
    expected = tokenize_pairs(pairs(), byte_tokenizer(), 60, left_out, pytest.fail)
    wanted = (expected, left_out.problems, dict(left_out.notes))
    assert run(pairs()) == wanted and len(wanted[1]) == 1
    assert run(pairs(), processes=2) == wanted
    assert run(pairs(), cache=tmp_path) == wanted
    monkeypatch.setattr(bulk, "_work", lambda chunk: pytest.fail("tokenised again"))
    assert run(pairs(), cache=tmp_path) == wanted
    # another place of the same rows: places are the new ones
    moved = [replace(p, source=p.source.replace("f:", "g:")) for p in pairs()]
    found, problems, _ = run(moved, cache=tmp_path)
    assert found[0].source == "g:0" and problems[0].where == "g:12"


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    expected = run(pairs(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x55
    for broken in (bytes(data), b"", bytes(data[:40])):
        file.write_bytes(broken)
        assert run(pairs(), cache=tmp_path) == expected
    assert len(list(tmp_path.iterdir())) == 1


def test_what_changes_the_ids_changes_the_name(tmp_path: Path) -> None:
    run(pairs(), cache=tmp_path)
    tokenizer = byte_tokenizer(template=None)
    tokenize_many(pairs()[1:], tokenizer, 60, LeftOut(), cache=tmp_path)
    tokenize_many(pairs()[1:], tokenizer, 50, LeftOut(), cache=tmp_path)
    tokenizer.eos_token = "<pad>"
    tokenize_many(pairs()[1:], tokenizer, 50, LeftOut(), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
