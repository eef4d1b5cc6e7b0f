"""`train --dry_run`: counts, memory and time of a run that is not made; what cannot fit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import chats, model, refused, run  # noqa: F401 (model is a fixture)
from test_data import random_pairs, write
from test_train import config_of, one_thread, tiny_model, tiny_policy  # noqa: F401

from dpo_kernels.data import make_batch
from dpo_kernels.train import checkpoints, dry_run, fit
from dpo_kernels.train.config import load_config, refusals

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def train(model: str, tmp_path: Path) -> list[Any]:  # noqa: F811
    file = write(tmp_path / "pairs.jsonl", [*chats(12), "{"])
    args: list[Any] = ["train", "--model_name_or_path", model, "--dataset_name", file]
    args += ["--device", "cpu", "--output_dir", tmp_path / "run", "--max_length", "64"]
    return [*args, "--per_device_train_batch_size", "3", "--num_train_epochs", "2"]


def test_it_reports_and_writes_nothing(train: list[Any], tmp_path: Path, capsys: Capture) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(*train, "--dry-run") == 0
    text = capsys.readouterr().out
    for words in (
        "11 pairs to train on, 1 held out; left out: 1 (1 broken JSON)",
        "8 optimizer steps of 3 pairs",
        "tokens of a sequence: median",
        "of the positions of a padded batch are not computed",
        "memory of the largest step on cpu, estimated:",
        "activations",
        "time, guessed from two steps of 3 pairs",
        "nothing was trained, nothing was written",
    ):
        assert words in text, words
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    # It is the run that it described.
    total = int(re.search(r"tokens each, (\d+) in all", text)[1])  # type: ignore[index]
    assert run(*train, "--logging_steps", "1", "--sample_max_new_tokens", "0") == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert f'"num_tokens": {total}' in rows and '"step": 8' in rows


def test_what_would_be_refused_is_all_said(train: list[Any], capsys: Capture) -> None:
    assert run(*train, "--dry_run", "--push_to_hub", "--deepspeed", "x.json") == 2
    said = capsys.readouterr()
    assert said.out.count("refused: ") == 2
    assert "2 option(s) are refused; the first: push_to_hub=True" in said.err
    found = refusals({"beta": 1, "bta": 2, "deepspeed": "zero3.json"})
    assert (
        len(found) == 2
        and "did you mean 'beta'" in found[0]
        and "deepspeed='zero3.json'" in found[1]
    )
    folder = Path(train[train.index("--output_dir") + 1])
    folder.mkdir()
    (folder / "x").write_text("mine")
    assert "is not empty" in refused(capsys, *train, "--dry_run")


def test_what_a_run_refuses_a_dry_one_does(
    train: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Packages, groups, the disk, another run's checkpoint; one that trains nothing is counted."""
    dry = [*train, "--dry_run"]
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "use_peft needs peft" in refused(capsys, *dry, "--use_peft")
    assert "no row has a `group`" in refused(capsys, *dry, "--learn_groups")
    zero = [*dry, "--max_steps", "0"]
    assert run(*zero) == 0
    assert "1 held-out pairs to evaluate" in capsys.readouterr().out
    assert "no pair is held out" in refused(capsys, *zero, "--eval_fraction", "0")
    assert run(*train, "--max_steps", "2", "--sample_max_new_tokens", "0") == 0
    again = [*dry, "--max_steps", "2", "--resume_from_checkpoint", "true"]
    assert run(*again) == 0
    assert "the run goes on at step 2" in capsys.readouterr().out
    assert "beta: 0.1 there, 0.2 here" in refused(capsys, *again, "--beta", "0.2")
    free = type("Usage", (), {"free": 20_000})()
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: free)
    assert "two checkpoints of" in refused(capsys, *dry, "--output_dir", tmp_path / "full")


def test_a_run_that_cannot_fit(
    train: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """trl#3168 and its like: said before anything is loaded, or before the first step."""
    weights = sum(p.numel() * 4 for p in tiny_model().parameters())
    monkeypatch.setattr(fit, "available", lambda device: 4 * weights - 1)
    line = refused(capsys, *train)
    assert "weights, gradients and optimizer take" in line and "parameters" in line
    assert not (tmp_path / "run").exists()
    assert run(*train, "--optim", "sgd", "--max_steps", "1") == 0  # three quarters of that
    more = 4 * weights + 1000
    monkeypatch.setattr(fit, "available", lambda device: more)
    monkeypatch.setattr(dry_run, "available", lambda device: more)
    other = [*train, "--output_dir", tmp_path / "other", "--dry_run"]
    assert "this run does not fit: its largest step takes about" in refused(capsys, *other)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("layout", ["padded", "prefix"])
def test_activations_are_what_autograd_keeps(name: str, layout: str) -> None:
    """The forward over fake tensors against the real one."""
    options = {"GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}}.get(name, {})
    policy = tiny_policy(tiny_model(name, **options), batch_layout=layout)
    batch = make_batch(random_pairs(6), policy.sharing, 0)
    own = {x.untyped_storage().data_ptr() for x in policy.model.parameters()}
    kept: dict[int, Any] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = policy.hidden(batch)
    real = sum(storage.nbytes() for storage in kept.values())
    found = fit.activations(policy, batch, False)
    assert hidden.requires_grad and real * 0.9 <= found <= real * 1.3
    assert fit.activations(policy, batch, True) < found


def test_activations_without_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("data dependent")

    policy = tiny_policy()
    batch = policy.batch(random_pairs(6))
    real = fit.activations(policy, batch, False)
    monkeypatch.setattr(fit, "_kept", fails)
    assert real / 4 < fit.activations(policy, batch, False) < real * 4


def test_step_memory_counts_what_there_is() -> None:
    policy = tiny_policy()
    batch = policy.batch(random_pairs(4))
    weights = sum(p.numel() * 4 for p in policy.model.parameters())
    found = fit.step_memory(policy, batch, config_of())
    assert (found["weights"], found["gradients"], found["optimizer"]) == (
        weights,
        weights,
        2 * weights,
    )
    assert found["head"] > 0 and found["activations"] > 0
    assert fit.step_memory(policy, batch, config_of(optim="sgd"))["optimizer"] == 0
    assert fit.step_memory(policy, batch, config_of(loss_type="tdpo1"))["reference"] == weights
    assert (fit.available(torch.device("cpu")) or 0) > 2**20
    assert fit.available(torch.device("meta")) is None
    fit.check_fits("no/such/model", load_config({"device": "cpu"}))  # loading it says more
