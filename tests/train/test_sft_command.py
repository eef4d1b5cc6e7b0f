"""`dpo-kernels sft`, and supervised data before and beside the pairs of `train`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import chats, model, refused, run  # noqa: F401 (model is a fixture)
from test_data import bot, user, write
from test_train import QUIET, config_of, data_of, one_thread, tiny_policy  # noqa: F401

from dpo_kernels.data import TokenSequence
from dpo_kernels.train import fit, loop, sft_dry_run
from dpo_kernels.train.compare import plain_logps
from dpo_kernels.train.metrics import MetricsFile, read_metrics
from dpo_kernels.train.sft import SupervisedRows, evaluate_sft, nll_gradients

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

Capture = pytest.CaptureFixture[str]
FAST = ("--device", "cpu", "--max_length", "64", "--per_device_train_batch_size", "4")


def conversations(n: int) -> list[dict[str, Any]]:
    return [{"messages": [user(f"say {i}"), bot("yes " * (1 + i % 3))]} for i in range(n)]


def sequences(n: int) -> list[TokenSequence]:
    return [TokenSequence(tuple(range(5, 11 + i)), 3, f"f:{i}") for i in range(n)]


def test_sft(model: str, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    rows = [*conversations(10), {"text": "plain"}, {"prompt": "Q: ", "completion": "A"}, "{"]
    file = write(tmp_path / "a.jsonl", rows)
    conf = tmp_path / "sft.yaml"
    conf.write_text(f"model_name_or_path: {model}\ndataset_name: {file}\nlearning_rate: 1e-2\n")
    out = tmp_path / "run"
    more = ("--max_steps", "6", "--logging_steps", "3", "--eval_steps", "2")
    assert run("sft", conf, *FAST, *more, "--output_dir", out, "--sample_prompt", "say 1") == 0
    text = capsys.readouterr().out
    assert "held-out loss per token" in text and "left out: 1 (1 broken JSON)" in text
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rows"], summary["held_out_rows"], summary["steps"]) == (11, 1, 6)
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    metrics = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in metrics if "loss" in r] == [3, 6]
    assert [r["step"] for r in metrics if "eval_loss" in r] == [0, 2, 4, 6]
    assert yaml.safe_load((out / "config.yaml").read_text())["learning_rate"] == 1e-2
    trained = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    start = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def test_mistakes(model: str, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    file = write(tmp_path / "a.jsonl", conversations(4))
    pairs = write(tmp_path / "p.jsonl", chats(4))
    given = ("sft", "--model_name_or_path", model, "--output_dir", tmp_path / "run", *FAST)
    cases: list[tuple[tuple[Any, ...], str]] = [
        (given, "dataset_name is missing"),
        (("sft", "--dataset_name", file), "model_name_or_path is missing"),
        ((*given, "--dataset_name", file, "--beta", "1"), "unknown option --beta"),
        ((*given, "--dataset_name", file, "--packing"), "packing=True is an option of TRL's"),
        ((*given, "--dataset_name", file, "--assistant_only_loss", "false"), "every turn"),
        ((*given, "--dataset_name", file, "--max_length", "2"), "no conversation fits max_length"),
        ((*given, "--dataset_name", pairs), "no usable conversation"),
    ]
    for args, message in cases:
        assert message in refused(capsys, *args)
    conf = tmp_path / "c.yaml"
    conf.write_text("beta: 1\n")
    assert "beta is an option of `train`" in refused(capsys, "sft", conf)
    assert not (tmp_path / "run").exists()
    train = ("train", "--model_name_or_path", model, "--dataset_name", pairs)
    assert "sft_rows needs sft_file" in refused(capsys, *train, "--sft_rows", "2")
    assert "of your own" in refused(capsys, "train", "--sft_file", file)


def test_sft_prints_its_own_options(tmp_path: Path, capsys: Capture) -> None:
    args = ("sft", "--model_name_or_path", "m", "--dataset_name", "d", "--print_config")
    assert run(*args) == 0
    text = capsys.readouterr().out
    found = yaml.safe_load(text)
    assert found["learning_rate"] == 2e-5 and "beta" not in found and "sft_rows" not in found
    (tmp_path / "c.yaml").write_text(text)
    assert run("sft", tmp_path / "c.yaml", "--print_config") == 0
    assert capsys.readouterr().out == text


def test_sft_then_pairs_in_one_command(
    model: str,  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """The reference of the pairs is the fine-tuned model; `sft_steps 0` leaves it out."""
    files = (
        "--dataset_name",
        write(tmp_path / "p.jsonl", chats(8)),
        "--sft_file",
        write(tmp_path / "s.jsonl", conversations(6)),
    )
    base = ("train", "--model_name_or_path", model, *files, *FAST, "--max_steps", "2")
    assert run(*base, "--output_dir", tmp_path / "a", "--sft_learning_rate", "1e-2") == 0
    text = capsys.readouterr().out
    assert "SFT on 6 conversations" in text and "step 0: loss 0.693147" in text
    assert read_metrics(tmp_path / "a" / "sft_metrics.jsonl")[-1]["step"] == 2  # one pass
    steps = ("--sft_steps", "3")
    assert run(*base, "--output_dir", tmp_path / "b", *steps) == 0
    assert read_metrics(tmp_path / "b" / "sft_metrics.jsonl")[-1]["step"] == 3
    mix = ("--sft_rows", "2", "--logging_steps", "1")
    assert run(*base, "--output_dir", tmp_path / "c", *mix) == 0
    assert not (tmp_path / "c" / "sft_metrics.jsonl").exists()
    rows = [r for r in read_metrics(tmp_path / "c" / "metrics.jsonl") if "loss" in r]
    assert len(rows) == 2 and all(r["sft/loss"] > 0 for r in rows)


# --- what is computed ---


def test_the_gradient_is_that_of_the_mean_over_the_tokens_of_the_step() -> None:
    policy, rows = tiny_policy(), sequences(5)
    found = []
    for micro in (5, 2):
        loss = nll_gradients(policy, rows, micro, weight=0.5)
        found.append((loss, [p.grad.clone() for p in policy.model.parameters()]))
        policy.model.zero_grad()
    torch.testing.assert_close(found[0], found[1])
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.ids])
        logps = policy.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total = total - logps.gather(-1, ids[0, 1:, None])[row.start - 1 :].sum()
    truth = total / sum(r.num_scored for r in rows)
    torch.testing.assert_close(found[0][0], truth.detach())
    (0.5 * truth).backward()
    torch.testing.assert_close(found[0][1], [p.grad for p in policy.model.parameters()])
    held = evaluate_sft(policy, rows, 2)
    assert held["eval_loss"] == pytest.approx(truth.item(), rel=1e-5)


def test_rows_beside_the_pairs_are_part_of_the_step(tmp_path: Path) -> None:
    """One step of plain SGD: pairs and rows by the definition, written out."""
    options = {
        "max_steps": 1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
    }
    options |= {"sft_rows": 3, "sft_rows_weight": 0.7, "max_grad_norm": 0.0}
    config = config_of(sft_file="x", **options)
    policy, other = tiny_policy(), tiny_policy()
    rows = sequences(4)
    data = data_of(policy, 4)
    beside = SupervisedRows(policy, rows, config)
    metrics = MetricsFile(tmp_path / "m.jsonl")
    loop.train(policy, data, None, config, metrics, QUIET, beside=beside)
    logps = plain_logps(other.model, data.pairs, 0)
    ratio = logps - logps.detach()
    pair_loss = -torch.nn.functional.logsigmoid(0.1 * (ratio[:4] - ratio[4:])).mean()
    chosen = SupervisedRows(other, rows, config).of_step(1)
    assert len({r.source for r in chosen}) == 3
    pair_loss.backward()
    nll = nll_gradients(other, chosen, 2, 0.7)
    for ours, theirs in zip(policy.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-6)
    assert metrics.rows[0]["sft/loss"] == pytest.approx(float(nll), rel=1e-5)


def test_which_rows_is_a_function_of_the_step() -> None:
    policy = tiny_policy()
    rows = sequences(5)
    beside = SupervisedRows(policy, rows, config_of(sft_file="x", sft_rows=3))
    first = [beside.of_step(i) for i in range(1, 6)]  # three passes of five
    assert [s.source for step in first for s in step] == [
        s.source for i in range(1, 6) for s in beside.of_step(i)
    ]
    flat = [s.source for step in first for s in step]
    for epoch in range(3):
        assert sorted(flat[5 * epoch : 5 * epoch + 5]) == sorted(s.source for s in rows)


def test_a_dry_run_reports_and_writes_nothing(
    model: str,  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"messages": [user(f"q {i}"), bot("an answer")]} for i in range(11)]
    file = write(tmp_path / "rows.jsonl", [*rows, "{"])
    args: list[Any] = ["sft", "--model_name_or_path", model, "--dataset_name", file]
    args += ["--device", "cpu", "--output_dir", tmp_path / "run", "--max_length", "64"]
    args += ["--per_device_train_batch_size", "3", "--num_train_epochs", "2", "--eval_fraction"]
    args += ["0.1", "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 2}']
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(*args, "--dry-run") == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    for words in (
        "10 rows to train on, 1 held out; left out: 1 (1 broken JSON)",
        "8 optimizer steps of 3 rows",
        "memory of the largest step on cpu, estimated:",
        "time, guessed from two steps of 3 rows",
        "nothing was trained, nothing was written",
    ):
        assert words in text, words
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    total = re.search(r"tokens each, (\d+) in all", text)
    assert run(*args, "--sample_max_new_tokens", "0", "--logging_steps", "1") == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert total is not None and f'"num_tokens": {total[1]}' in lines
    assert "refused" in refused(capsys, *args, "--dry_run", "--packing", "true")
    monkeypatch.setattr(fit, "available", lambda device: 10**9)
    monkeypatch.setattr(sft_dry_run, "available", lambda device: 1000)
    line = refused(capsys, *args, "--dry_run", "--overwrite_output_dir")
    assert "this run does not fit" in line
