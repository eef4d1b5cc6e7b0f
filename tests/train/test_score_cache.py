"""`score` against the log-probs that a reference cache holds, with and without the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli import chats, model, refused, run  # noqa: F401 (model is a fixture)
from test_data import bot, user, write
from test_references import other_model
from test_train import one_thread  # noqa: F401

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

Capture = pytest.CaptureFixture[str]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert [r["source"] for r in a] == [r["source"] for r in b]
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            assert name == "source" or value == pytest.approx(y[name], abs=2e-5)


def test_what_training_cached_is_scored_against(
    model: str,  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """The run's own reference, read from its cache: no second model, the same numbers."""
    file = write(tmp_path / "pairs.jsonl", chats(8))
    cache = tmp_path / "cache"
    train = ("train", "--model_name_or_path", model, "--dataset_name", file, "--device", "cpu")
    train += ("--max_length", "128", "--max_steps", "1", "--output_dir", tmp_path / "run")
    train += ("--eval_fraction", "0.25", "--num_train_epochs", "1", "--learning_rate", "1e-3")
    train += ("--per_device_train_batch_size", "8", "--sample_max_new_tokens", "0")
    assert run(*train, "--reference_cache", cache) == 0, capsys.readouterr().err
    score = ("score", "--model_name_or_path", tmp_path / "run" / "model", "--device", "cpu")
    score += ("--dataset_name", file, "--max_length", "128", "--output_file")
    ref = ("--ref_model_name_or_path", model)
    assert run(*score, tmp_path / "plain.jsonl", *ref) == 0
    assert run(*score, tmp_path / "cached.jsonl", "--reference_cache", cache) == 0
    assert "reference: 8 rows from the cache, 0 computed" in capsys.readouterr().out
    same(rows_of(tmp_path / "plain.jsonl"), rows_of(tmp_path / "cached.jsonl"))
    assert rows_of(tmp_path / "cached.jsonl")[0]["margins"] != 0.0
    # A row that is not there: named without the model, computed and kept with it.
    more = write(tmp_path / "more.jsonl", [*chats(8), {"messages": [user("q"), bot("a")]}])
    score = (*score[:6], more, *score[7:])
    lacking = refused(capsys, *score, tmp_path / "a.jsonl", "--reference_cache", cache)
    assert f"{more}:9: the reference cache" in lacking and "does not hold this row" in lacking
    for kept in (8, 9):
        out = (tmp_path / f"more{kept}.jsonl", "--reference_cache", cache, *ref)
        assert run(*score, *out) == 0
        said = f"reference: {kept} rows from the cache, {9 - kept} computed"
        assert said in capsys.readouterr().out
    same(rows_of(tmp_path / "more8.jsonl"), rows_of(tmp_path / "more9.jsonl"))
    # Of several references the folder of one is named; a model finds its own.
    other = other_model(tmp_path / "other")
    second = ("--reference_cache", cache, "--ref_model_name_or_path", other)
    assert run(*score, tmp_path / "second.jsonl", *second) == 0
    assert "0 rows from the cache, 9 computed" in capsys.readouterr().out
    line = refused(capsys, *score, tmp_path / "b.jsonl", "--reference_cache", cache)
    assert "holds the log-probs of 2 references" in line
    for folder in cache.iterdir():
        out = (tmp_path / f"{folder.name}.jsonl", "--reference_cache", folder)
        assert run(*score, *out) == 0
    moved = tmp_path / "moved" / ("0" * 32)
    shutil.copytree(next(cache.iterdir()), moved)
    line = refused(capsys, *score, tmp_path / "c.jsonl", "--reference_cache", moved)
    assert "is not of the folder that it stands in" in line
    line = refused(capsys, *score, tmp_path / "c.jsonl", "--reference_cache", tmp_path / "none")
    assert "holds the log-probs of 0 references; pass ref_model_name_or_path" in line
