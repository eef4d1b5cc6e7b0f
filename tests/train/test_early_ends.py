"""Runs that end early: by a signal, a loss that is not finite, or before anything was trained."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import model, refused, run  # noqa: F401 (model is a fixture)
from test_cli_faults import folder_of, train  # noqa: F401 (train is a fixture)
from test_data import write
from test_train import one_thread  # noqa: F401 (a fixture)

from dpo_kernels.train import loop, start
from dpo_kernels.train.console import Console
from dpo_kernels.train.metrics import read_metrics

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

Capture = pytest.CaptureFixture[str]


def after_step(n: int, monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Call `action` within the n-th optimizer step of training on pairs."""
    step, done = loop.Stepper.step, []

    def watched(self: Any, *args: Any) -> Any:
        done.append(1)
        if len(done) == n:
            action()
        return step(self, *args)

    monkeypatch.setattr(loop.Stepper, "step", watched)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_weights_of_whole_steps(
    train: list[Any],  # noqa: F811
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    after_step(2, monkeypatch, lambda: os.kill(os.getpid(), number))
    assert run(*train, "--lr_scheduler_type", "constant") == code
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert f"its weights are in {folder_of(train) / 'model'}" in error and "Traceback" not in error
    assert [r["step"] for r in read_metrics(folder_of(train) / "metrics.jsonl")] == [0, 1, 2]
    other = [*train, "--lr_scheduler_type", "constant", "--max_steps", "2", "--output_dir"]
    straight = folder_of(train).with_name("straight")
    assert run(*other, straight) == 0
    stopped, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(f / "model").state_dict()
        for f in (folder_of(train), straight)
    )
    assert all(torch.equal(stopped[k], whole[k]) for k in whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_stops_at_once() -> None:
    console = Console(quiet=True)
    with pytest.raises(KeyboardInterrupt), console.signals():
        for _ in console.progress(range(3), "training", 3, "steps"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on")
    assert console.done == 0


def test_a_loss_that_is_not_finite_keeps_the_weights(
    train: list[Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    args = [*train, "--learning_rate", "1e30", "--max_grad_norm", "0", "--overwrite_output_dir"]
    assert run(*args) == 1
    error = capsys.readouterr().err
    assert "training stopped: step 2" in error and "its weights are in" in error
    assert (folder_of(train) / "model" / "config.json").is_file()

    # anything else that breaks training off is no reason to lose it
    def full() -> None:
        raise RuntimeError("out of memory")

    after_step(3, monkeypatch, full)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(*train, "--overwrite_output_dir")
    assert "its weights are in" in capsys.readouterr().err
    assert (folder_of(train) / "model" / "config.json").is_file()


def test_a_failed_start_leaves_nothing(train: list[Any], tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    folder = tmp_path / "deep" / "run"
    bad = write(tmp_path / "bad.jsonl", ["{"])
    refused(capsys, *train, "--output_dir", folder, "--dataset_name", bad)
    refused(capsys, *train, "--output_dir", folder, "--chat_template", "none.jinja")
    assert not (tmp_path / "deep").exists()
    assert run(*train, "--output_dir", folder) == 0


def test_a_start_interrupted_before_training_leaves_nothing(
    train: list[Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    from dpo_kernels.train import reference

    def killed(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(reference.Referee, "data", killed)
    assert run(*train) == 143
    assert not folder_of(train).exists()


def test_overwriting_leaves_no_file_of_the_run_before(train: list[Any], capsys: Capture) -> None:  # noqa: F811
    folder = folder_of(train)
    assert run(*train, "--max_steps", "1") == 0
    (folder / "sft_metrics.jsonl").write_text("old")
    (folder / "model" / "old.bin").write_text("old")
    (folder / "notes.txt").write_text("mine")
    (folder / "summary.json").write_text("old")
    # a start that fails takes nothing away
    refused(capsys, *train, "--overwrite_output_dir", "--dataset_name", "none.jsonl")
    assert (folder / "sft_metrics.jsonl").exists()
    assert run(*train, "--max_steps", "1", "--overwrite_output_dir") == 0
    assert "no run wrote; they stay: notes.txt" in capsys.readouterr().out
    assert not (folder / "sft_metrics.jsonl").exists() and not (folder / "model/old.bin").exists()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    optional = {"sft_metrics.jsonl", "tensorboard", "wandb"}
    assert set(start.RUN_FILES) - optional == {p.name for p in folder.iterdir()} - {"notes.txt"}
