"""Options about data on the command line: streams, mapped columns, the reference's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli_faults import chats, folder_of, model, run, train, write  # noqa: F401

Capture = pytest.CaptureFixture[str]


def test_streamed_training(train: list[Any], capsys: Capture) -> None:  # noqa: F811
    """The same run without reading the file first; a bad row is met while training."""
    file = Path(train[train.index("--dataset_name") + 1])
    file.write_text(file.read_text() + "{\n" * 20)
    assert run(*train, "--dataset_streaming", "--eval_fraction", "0.3") == 0
    text = capsys.readouterr().out
    assert "32 rows, read as they are asked for; 10 of them held out" in text
    assert "step 0: loss 0.6931" in text
    noted = (folder_of(train) / "left_out.jsonl").read_text().splitlines()
    summary = json.loads((folder_of(train) / "summary.json").read_text())
    assert summary["left_out"] == {"broken JSON": len(noted)} and noted


def test_a_second_run_does_no_reference_pass(
    train: list[Any],  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
) -> None:
    cache = ["--reference_cache", tmp_path / "cache", "--overwrite_output_dir"]
    assert run(*train, *cache) == 0
    assert "reference log-probs (training pairs): 0" not in capsys.readouterr().out
    other = ["--learning_rate", "1e-3", "--loss_type", "ipo", "--ld_alpha", "0.5"]
    assert run(*train, *cache, *other[:4]) == 0
    text = capsys.readouterr().out
    assert text.count("are in the cache, no pass") == 2, text
    assert run(*train, *cache, "--ld_alpha", "0.5", "--seed", "42") == 0
    assert capsys.readouterr().out.count("are in the cache, no pass") == 2
    assert run(*train, *cache, "--reference_cache", "none") == 0
    assert "cache" not in capsys.readouterr().out


def test_mapped_columns_and_truncation(train: list[Any], capsys: Capture) -> None:  # noqa: F811
    file = Path(train[train.index("--dataset_name") + 1])
    file.write_text(file.read_text().replace('"prompt"', '"question"'))
    assert run(*train, "--column_mapping", "prompt=question", "--truncation_mode", "keep_end") == 0
    capsys.readouterr()
    assert run(*train, "--column_mapping", "question", "--overwrite_output_dir") == 2
    assert "expected ours=theirs" in capsys.readouterr().err
