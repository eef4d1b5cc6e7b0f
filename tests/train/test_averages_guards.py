"""The average of the weights, steps left out, early stopping, evaluation only, compiled models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import arguments, check, prepare
from test_data import bot, user, write
from test_train import config_of, data_of, one_thread, run_train, tiny_policy  # noqa: F401

from dpo_kernels.cli import main
from dpo_kernels.train import loop
from dpo_kernels.train.averages import Average
from dpo_kernels.train.config import UserError, load_config
from dpo_kernels.train.metrics import MetricsFile, read_metrics
from dpo_kernels.train.optim import Stepper, TrainingError


def test_the_average_follows_and_is_what_is_left(tmp_path: Path, monkeypatch: Any) -> None:
    """As the recursion says, in fp32; the model ends as the average."""
    seen: list[torch.Tensor] = []
    follow = Average.follow

    def watched(self: Average, step: int) -> None:
        seen.append(self.model.lm_head.weight.detach().clone())
        follow(self, step)

    monkeypatch.setattr(Average, "follow", watched)
    policy, _ = run_train(tmp_path, max_steps=4, ema_decay=0.4)
    expected = tiny_policy().model.lm_head.weight.detach().clone()
    for step, weight in enumerate(seen, start=1):
        expected.lerp_(weight, 1 - min(0.4, (1 + step) / (10 + step)))
    torch.testing.assert_close(policy.model.lm_head.weight.detach(), expected)
    assert not torch.equal(policy.model.lm_head.weight, seen[-1])


@pytest.mark.parametrize("optim", ["adagrad", "adafactor"])
@pytest.mark.parametrize("schedule", ["polynomial"])
def test_more_optimizers_and_schedules(tmp_path: Path, optim: str, schedule: str) -> None:
    _, rows = run_train(tmp_path, max_steps=2, optim=optim, lr_scheduler_type=schedule)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert rows[1]["learning_rate"] < rows[0]["learning_rate"]


def test_all_that_steps_change_is_resumed(tmp_path: Path) -> None:
    """An average, an optimizer with other state, and steps since the last line: to the bit."""
    prepare(tmp_path)
    options = {
        "loss_type": "sigmoid",
        "optim": "adafactor",
        "ema_decay": 0.5,
        "lr_scheduler_type": "cosine_with_restarts",
        "save_steps": 3,
        "logging_steps": 2,
    }
    assert check(tmp_path, ["before a checkpoint's name"], **options) == []


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The losses of these steps are not finite."""
    plain, count = loop._gradients, iter(range(1, 1000))

    def bad(*args: Any) -> Any:
        total, work = plain(*args)
        return (total * math.nan if next(count) in steps else total), work

    monkeypatch.setattr(loop, "_gradients", bad)


def test_steps_that_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They change nothing but the schedule, are counted, and no more than asked for."""
    poison(monkeypatch, 2)
    policy, rows = run_train(tmp_path, max_steps=3, skip_nonfinite=1, loss_type="beta_dpo")
    assert [r.get("skipped_steps") for r in rows] == [0, 1, 1]
    assert "loss" not in rows[1] and math.isfinite(rows[2]["loss"])
    assert all(p.isfinite().all() for p in policy.model.parameters())
    json.dumps(rows, allow_nan=False)
    monkeypatch.undo()
    poison(monkeypatch, 1, 2)
    with pytest.raises(TrainingError, match="step 2: the loss is nan"):
        run_train(tmp_path, max_steps=3, skip_nonfinite=1)


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and norm come in one transfer; neither is asked for by itself."""
    policy = tiny_policy()
    stepper = Stepper(policy.model, config_of(check_first_step=False), 3)
    calls: set[str] = set()
    for name in ("item", "tolist", "__bool__", "__float__"):
        plain = getattr(torch.Tensor, name)

        def counted(self: Any, *args: Any, name: str = name, plain: Any = plain) -> Any:
            calls.add(name)
            return plain(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for p in policy.model.parameters():
        p.grad = torch.ones_like(p)
    stepper.step(torch.tensor(0.5), "step 1", ["f:0"])
    monkeypatch.undo()
    assert calls == {"tolist"}


def test_early_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of 0 lowers nothing: the first evaluation is the best, the third ends the run."""
    prepare(tmp_path)
    options = {
        "loss_type": "sigmoid",
        "learning_rate": 0,
        "check_first_step": False,
        "eval_steps": 1,
        "early_stopping_patience": 2,
    }
    assert main(arguments(tmp_path, "run", **options)) == 0
    assert "stopped at step 3: 2 evaluations" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 3
    assert (tmp_path / "run/checkpoints/step-3").is_dir()
    # a resumed run has the patience that was left
    assert main(arguments(tmp_path, "run", **options, resume_from_checkpoint="true")) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 3
    with pytest.raises(UserError, match="needs eval_steps"):
        load_config({"early_stopping_patience": 2})


def test_evaluation_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path)
    assert main(arguments(tmp_path, "run", max_steps=0)) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 0 and summary["before"] == summary["after"] != {}
    assert summary["calibration"]["pairs"] == 2
    assert not (tmp_path / "run/model").exists()
    assert [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl")] == [0]
    assert main(arguments(tmp_path, "none", max_steps=0, eval_fraction=0)) == 2
    assert "no pair is held out" in capsys.readouterr().err


def test_a_compiled_model_trains_the_same(tmp_path: Path) -> None:
    """Compiled while it trains alone; dynamo's own backend, since a gate has no compiler."""
    plain, rows = run_train(tmp_path, max_steps=2)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    policy, compiled = run_train(tmp_path, max_steps=2, **options)
    for a, b in zip(rows, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert policy.model.model._compiled_call_impl is None
    assert set(policy.model.state_dict()) == set(plain.model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"skip_nonfinite": -1}, "skip_nonfinite must be at least 0"),
        ({"early_stopping_patience": 0, "eval_steps": 1}, "at least 1 or null"),
        ({"optim": "lion_8bit"}, "optim must be one of"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type must be one of"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(options)


def test_metrics_of_speed_and_memory(tmp_path: Path) -> None:
    """A shared prompt is computed once: positions are saved beside padded batches."""
    policy = tiny_policy(batch_layout="prefix")
    data = data_of(policy)
    metrics = MetricsFile(tmp_path / "m.jsonl")
    loop.train(policy, data, None, config_of(max_steps=1), metrics, loop.Console(quiet=True))
    row = metrics.rows[0]
    assert 0 < row["padding_saved"] < 1 and row["mem/peak"] > 0 and row["tokens_per_s"] > 0


def test_what_is_forgotten_is_measured(tmp_path: Path) -> None:
    """The loss of conversations that are held out, at every evaluation of the pairs."""
    prepare(tmp_path)
    rows = [{"messages": [user(f"say {i}"), bot("maybe so")]} for i in range(3)]
    file = write(tmp_path / "chats.jsonl", rows)
    options = {"loss_type": "sigmoid", "sft_eval_file": file, "max_steps": 8}
    assert main(arguments(tmp_path, "run", **options)) == 0
    found = read_metrics(tmp_path / "run/metrics.jsonl")
    losses = [r["eval_sft_loss"] for r in found if "eval_loss" in r]
    assert len(losses) == 3 and losses[0] != losses[2]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["before"]["eval_sft_loss"] == losses[0]
