"""Metrics to trackio, TensorBoard and W&B; the model card."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from killed_runs import arguments, prepare
from test_early_ends import after_step
from test_train import one_thread  # noqa: F401 (a fixture)

from dpo_kernels.cli import main
from dpo_kernels.train.card import card
from dpo_kernels.train.config import UserError, load_config
from dpo_kernels.train.sinks import Run, Sinks, TensorBoard, check_sinks


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, fails_at: int = -1) -> list[Any]:
    """A module with the calls of trackio or wandb that are used; returns what it was told."""
    told: list[Any] = []

    def log(row: dict[str, float], step: int | None = None) -> None:
        if len(told) == fails_at:
            raise ConnectionError("the server has gone")
        told.append((step, row))

    def init(**options: Any) -> Any:
        told.append(options)
        return types.SimpleNamespace(log=log, finish=lambda: told.append("finished"))

    module = types.ModuleType(name)
    vars(module).update(init=init, log=log, finish=lambda: told.append("finished"))
    monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


OPTIONS: dict[str, Any] = {"loss_type": "sigmoid", "max_steps": 4, "logging_steps": 2}


def test_services_get_every_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under transformers' names; a resumed run is the same run there."""
    trackio, wandb = stand_in(monkeypatch, "trackio"), stand_in(monkeypatch, "wandb")
    args = arguments(folder, "run", **OPTIONS, run_name="mine")
    args = [*args, "--report_to", "trackio", "wandb"]
    assert main(args) == 0
    start, *lines, end = trackio
    assert (start["name"], start["project"], end) == ("mine", "dpo-kernels", "finished")
    assert start["config"]["beta"] == 0.1
    assert [step for step, _ in lines] == [0, 2, 4, 4]
    assert "eval/loss" in lines[0][1] and "train/rewards/margins" in lines[1][1]
    assert wandb[2][1]["train/global_step"] == 2 and wandb[-1] == "finished"
    ids = [wandb[0]["id"]]
    assert main([*args, "--resume_from_checkpoint", "true"]) == 0
    ids.append(next(x["id"] for x in reversed(wandb) if isinstance(x, dict)))
    assert ids[0] == ids[1] and wandb[0]["resume"] == "allow"


def test_a_service_that_fails_ends_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "trackio", fails_at=2)
    assert main([*arguments(folder, "run", **OPTIONS), "--report_to", "trackio"]) == 0
    out = capsys.readouterr().out
    assert out.count("trackio takes no more metrics (the server has gone)") == 1
    assert len((folder / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_that_ends_early_closes_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = stand_in(monkeypatch, "trackio")

    def stop() -> None:
        raise RuntimeError("stop")

    after_step(2, monkeypatch, stop)
    with pytest.raises(RuntimeError, match="stop"):
        main([*arguments(folder, "run", **OPTIONS), "--report_to", "trackio"])
    assert told[-1] == "finished"


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    run = Run(tmp_path, load_config({"report_to": "tensorboard"}), "id", 0)
    said: list[str] = []
    sinks = Sinks(run, said.append)
    assert isinstance(sinks.open["tensorboard"], TensorBoard)
    sinks.write({"step": 2, "epoch": 0.5, "loss": 0.7, "eval_loss": 0.6})
    sinks.close()
    assert not said and list((tmp_path / "tensorboard").glob("events.*"))


def test_what_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"report_to: wandb needs wandb .*pip install wandb"):
        check_sinks(["wandb"])
    with pytest.raises(UserError, match="report_to must be of trackio, tensorboard, wandb"):
        check_sinks(["mlflow"])
    assert load_config({"report_to": "none"}).report_to == []
    assert load_config({"report_to": ["none"]}) == load_config({})


def test_the_card_says_what_was_trained(folder: Path) -> None:
    assert main(arguments(folder, "run", **OPTIONS, beta=0.25)) == 0
    text = (folder / "run/model/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == str(folder / "model")
    for words in ("beta 0.25", "sigmoid", "pairs.jsonl: 14 pairs, 2 held out", "torch 2", "loss"):
        assert words in body
    config = load_config({"use_peft": True, "use_dora": True, "model_name_or_path": "a|b"})
    made = card(config, {"pairs": 1, "held_out_pairs": 0, "steps": 3}, "DPO: sigmoid")
    assert "DoRA adapter, rank 16" in made and "| reference | the base model |" in made
    assert "a\\|b" in made
