"""Training on completions with a label (kto, apo_zero_unpaired) and on ranked lists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import chats, model, refused, run  # noqa: F401 (model is a fixture)
from test_data import bot, random_pairs, user, write
from test_train import QUIET, config_of, one_thread, tiny_policy  # noqa: F401

import dpo_kernels as dk
from dpo_kernels.data import TokenCompletion, TokenRanking, TokenSequence
from dpo_kernels.train import loop
from dpo_kernels.train.config import UserError
from dpo_kernels.train.metrics import MetricsFile, read_metrics
from dpo_kernels.train.order import step_indices
from dpo_kernels.train.reference import Referee
from dpo_kernels.train.resume import references
from dpo_kernels.train.step_loss import Mismatched, loss_of

pytest.importorskip("transformers", reason="the trainer needs transformers")

Capture = pytest.CaptureFixture[str]


def completions(n: int) -> list[TokenCompletion]:
    rows = random_pairs(n)
    weights = [None, 0.5, 2.0]
    return [
        TokenCompletion(p.prompt, p.chosen, f"r:{i}", i % 3 != 1, weights[i % 3])
        for i, p in enumerate(rows)
    ]


def rankings(sizes: list[int]) -> list[TokenRanking]:
    rows = random_pairs(3 * len(sizes))
    return [
        TokenRanking(rows[3 * i].prompt, tuple(p.chosen for p in rows[3 * i :][:size]), f"l:{i}")
        for i, size in enumerate(sizes)
    ]


def plain_sums(policy: Any, sequences: list[TokenSequence]) -> torch.Tensor:
    """Log-probs from the model's own logits, one sequence at a time."""
    found = []
    for s in sequences:
        logits = policy.model(torch.tensor([s.ids])).logits[0].double().log_softmax(-1)
        found.append(sum(logits[t - 1, s.ids[t]] for t in s.scored))
    return torch.stack(found)


def mismatched_of(rows: list[TokenCompletion], order: list[int]) -> list[TokenSequence]:
    pairs = zip(order, [order[-1], *order[:-1]], strict=True)
    return [
        TokenSequence(rows[i].prompt + rows[j].completion, len(rows[i].prompt), "")
        for i, j in pairs
    ]


def literal(policy: Any, start: Any, rows: list[TokenCompletion], order: list[int], c: Any) -> Any:
    """(loss, z) of a step in plain torch."""
    mine = [rows[i] for i in order]
    ratio = plain_sums(policy, [r.sequences[0] for r in mine])
    ratio = ratio - plain_sums(start, [r.sequences[0] for r in mine]).detach()
    other = mismatched_of(rows, order)
    z = (plain_sums(policy, other) - plain_sums(start, other)).mean().detach().clamp(min=0)
    if c.loss_type != ["kto"]:
        z = torch.zeros(())
    losses = []
    for row, r in zip(mine, ratio, strict=True):
        side = c.desirable_weight if row.desirable else c.undesirable_weight
        sign = 1.0 if row.desirable else -1.0
        losses.append((side or 1.0) * (row.weight or 1.0) * torch.sigmoid(-sign * c.beta * (r - z)))
    return torch.stack(losses).mean(), z


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_unpaired_steps_are_those_of_plain_torch(
    loss_type: str, accumulation: int, tmp_path: Path
) -> None:
    """Three steps of rows in other batches: loss, z and weights, z from the step's global order."""
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "beta": 0.5,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
        "per_device_train_batch_size": 6 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        "learning_rate": 3e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    config, policy, plain = config_of(**options), tiny_policy(), tiny_policy()
    start, rows = tiny_policy(), completions(12)
    data, _ = references(Referee(policy, config, QUIET), rows, [], tmp_path, None)
    assert (data.mismatched is not None) == (loss_type == "kto")
    metrics = MetricsFile(tmp_path / "m.jsonl")
    loop.train(policy, data, None, config, metrics, QUIET)
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=3e-2)
    seen_z = []
    for (order, _), row in zip(step_indices(12, config, 3), metrics.rows, strict=True):
        loss, z = literal(plain, start, rows, order, config)
        assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
        assert row["kl"] == pytest.approx(float(z), abs=1e-4)
        seen_z.append(float(z))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss_type != "kto" or max(seen_z) > 0
    for a, b in zip(policy.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_z_of_a_step_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    rows, found = completions(9), []
    for options in (
        {"per_device_train_batch_size": 9},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 9, "max_tokens_per_batch": 60},
        {"per_device_train_batch_size": 9, "layout": "packed"},
    ):
        config = config_of(loss_type="kto", max_steps=4, learning_rate=1e-2, **options)
        policy = tiny_policy(layout=options.get("layout", "auto"))
        data, held = references(Referee(policy, config, QUIET), rows, rows[:4], tmp_path, None)
        metrics = MetricsFile(tmp_path / "m.jsonl")
        loop.train(policy, data, held, config, metrics, QUIET)
        found.append([(r["loss"], r["kl"]) for r in metrics.rows])
        assert held is not None
        sizes = [config_of(loss_type="kto", per_device_eval_batch_size=n) for n in (1, 4)]
        a, b = (loop.evaluate(policy, held, c, QUIET, "") for c in sizes)
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)
        assert a["eval_kl"] == pytest.approx(b["eval_kl"], rel=1e-4, abs=1e-6)
    for other in found[1:]:
        assert torch.tensor(other) == pytest.approx(torch.tensor(found[0]), rel=2e-3, abs=1e-4)


def test_mismatched_rows() -> None:
    rows = completions(5)
    asked = Mismatched(rows, 1000)
    assert [divmod(k, 5) for k in asked.keys([3, 0, 4])] == [(3, 4), (0, 3), (4, 0)]
    assert [divmod(k, 5) for k in asked.keys([0])] == [(0, 4)]  # alone in its step
    got = asked[3 * 5 + 1]
    assert (got.prompt, got.completion) == (rows[3].prompt, rows[1].completion)
    cut = Mismatched(rows, len(rows[3].prompt) + 2)[3 * 5 + 1]
    assert cut.completion == rows[1].completion[:2]
    spans = replace(rows[1], unscored=((len(rows[1].prompt) + 1, len(rows[1].prompt) + 2),))
    moved = Mismatched([spans, rows[0]], None)[1 * 2 + 0]
    P = len(rows[0].prompt)
    assert moved.unscored == ((P + 1, P + 2),)


@pytest.mark.parametrize("mode", ["padded", "packed", "shared"])
def test_ranked_lists_train(mode: str, tmp_path: Path) -> None:
    """Lists of unequal lengths in one step: the loss is that of their log-probs in plain torch."""
    options = {"loss_type": "plackett_luce", "beta": 0.4, "max_steps": 3, "layout": mode}
    config = config_of(per_device_train_batch_size=5, learning_rate=1e-2, **options)
    policy, start = tiny_policy(layout=mode), tiny_policy()
    rows = rankings([3, 2, 3, 3, 2])
    data, held = references(Referee(policy, config, QUIET), rows, rows, tmp_path, None)
    metrics = MetricsFile(tmp_path / "m.jsonl")
    loop.train(policy, data, held, config, metrics, QUIET)
    assert held is not None
    after = loop.evaluate(policy, held, config, QUIET, "")
    losses = []
    for row in rows:
        with torch.no_grad():
            ratio = plain_sums(policy, list(row.sequences)) - plain_sums(start, list(row.sequences))
        a = 0.4 * ratio
        losses.append(sum(a[k:].logsumexp(0) - a[k] for k in range(len(a) - 1)))
    assert after["eval_loss"] == pytest.approx(float(sum(losses)) / 5, rel=1e-4)
    assert after["eval_loss"] < metrics.rows[0]["loss"]
    expected = (3 * torch.tensor(6.0).log() + 2 * torch.tensor(2.0).log()) / 5
    assert metrics.rows[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_list_computes_its_prompt_once() -> None:
    policy = tiny_policy(layout="shared")
    row = rankings([3])[0]
    batch = policy.batch([row])
    assert batch.trunk_tokens <= row.size
    assert batch.trunk_tokens < sum(len(s.ids) for s in row.sequences)


def test_a_ranking_of_two_is_sigmoid(tmp_path: Path) -> None:
    pairs = random_pairs(6)
    lists = [TokenRanking(p.prompt, (p.chosen, p.rejected), p.source) for p in pairs]
    found = []
    for rows, loss_type in ((pairs, "sigmoid"), (lists, "plackett_luce")):
        config = config_of(loss_type=loss_type, max_steps=3)
        policy = tiny_policy()
        data, _ = references(Referee(policy, config, QUIET), rows, [], tmp_path, None)
        metrics = MetricsFile(tmp_path / "m.jsonl")
        loop.train(policy, data, None, config, metrics, QUIET)
        names = ("loss", "rewards/margins", "logps/chosen", "grad_norm")
        found.append([[row[name] for name in names] for row in metrics.rows])
    assert torch.tensor(found[0]) == pytest.approx(torch.tensor(found[1]), rel=1e-4, abs=1e-6)


# --- from files ---


def labelled(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [user(f"say {i}")],
            "completion": [bot("yes " * (1 + i % 3))] if i % 2 else [bot("no")],
            "label": bool(i % 2),
        }
        for i in range(n)
    ]


def ranked(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [user(f"say {i}")],
            "completions": ["no", "yes " * (1 + i % 3), "well"],
            "scores": [0.0, 2.0, 1.0],
        }
        for i in range(n)
    ]


def args(model: str, file: Path, out: Path, *more: Any) -> list[Any]:  # noqa: F811
    found: list[Any] = ["train", "--model_name_or_path", model, "--dataset_name", file]
    found += ["--device", "cpu", "--output_dir", out, "--max_length", "64", "--logging_steps", "1"]
    return [*found, "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", *more]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired", "plackett_luce"])
def test_from_the_command_line(model: str, tmp_path: Path, loss_type: str, capsys: Capture) -> None:  # noqa: F811
    rows = ranked(16) if loss_type == "plackett_luce" else labelled(16)
    file, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    code = run(*args(model, file, out, "--loss_type", loss_type, "--max_steps", "4"))
    text = capsys.readouterr().out
    assert code == 0, text
    summary = json.loads((out / "summary.json").read_text())
    at_start = {"kto": 0.5, "apo_zero_unpaired": 0.5, "plackett_luce": 1.791759}[loss_type]
    assert summary["step0_loss"] == pytest.approx(at_start, abs=1e-5)
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert ("kl" in read_metrics(out / "metrics.jsonl")[1]) == (loss_type != "plackett_luce")
    assert (loss_type == "plackett_luce") == ("ranked lists to train on" in text)
    assert (out / "model" / "README.md").read_text().count("DPO") == 0


def test_from_yaml_and_resumed(model: str, tmp_path: Path) -> None:  # noqa: F811
    """Killed behind a checkpoint and gone on with: the same weights, z's reference included."""
    import yaml

    file = write(tmp_path / "rows.jsonl", labelled(14))
    config = {
        "model_name_or_path": model,
        "dataset_name": str(file),
        "loss_type": "kto",
        "undesirable_weight": 0.5,
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "device": "cpu",
        "logging_steps": 1,
        "sample_max_new_tokens": 0,
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    assert run("train", path, "--output_dir", tmp_path / "whole") == 0
    assert run("train", path, "--output_dir", tmp_path / "cut", "--max_steps", "3") == 0
    cut = tmp_path / "cut" / "checkpoints" / "step-00000002"
    found = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))
    cut = next(p for p in found if p.name.endswith("2"))
    out = tmp_path / "again"
    code = run("train", path, "--output_dir", out, "--resume_from_checkpoint", cut)
    assert code == 0
    a, b = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("whole", "again"))
    for x, y in zip(a, b, strict=True):
        for name in ("eval_loss", "loss", "kl", "grad_norm"):
            assert x.get(name) == y.get(name), (name, x, y)


WRONG = [
    ("kto", chats(4), "a preference pair"),
    ("apo_zero_unpaired", chats(4), "kto and apo_zero_unpaired are losses of single completions"),
    ("sigmoid", labelled(4), "unpaired data is of KTO and its like (loss_type kto"),
    ("plackett_luce", labelled(4), "one completion with a label, expected a list `completions`"),
    ("kto", [{"prompt": "a", "completion": "b"}] * 4, "label: missing, expected true (good)"),
]


@pytest.mark.parametrize(("loss_type", "rows", "words"), WRONG)
def test_rows_of_another_kind_are_named(
    model: str,  # noqa: F811
    tmp_path: Path,
    loss_type: str,
    rows: list[dict[str, Any]],
    words: str,
    capsys: Capture,
) -> None:
    file = write(tmp_path / "rows.jsonl", rows)
    assert run(*args(model, file, tmp_path / "run", "--loss_type", loss_type)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": ["kto", "sft"]}, "'kto' cannot be mixed with other losses"),
        (
            {"loss_type": "kto", "label_smoothing": 0.1},
            "label_smoothing=0.1 has no meaning",
        ),
        ({"loss_type": "kto", "sft_weight": 1.0}, "sft_weight=1.0 has no meaning for kto"),
        ({"loss_type": "plackett_luce", "ld_alpha": 0.5}, "ld_alpha=0.5 has no meaning for plack"),
        ({"loss_type": "plackett_luce", "desirable_weight": 2.0}, "is an option of kto, apo_zero"),
        ({"desirable_weight": 2.0}, "desirable_weight=2.0 is an option of kto"),
        ({"loss_type": "kto", "undesirable_weight": -1.0}, "undesirable_weight must be at least 0"),
        ({"loss_type": "kto", "per_device_train_batch_size": 1}, "must be at least 2, got 1"),
        ({"loss_type": "kto", "learn_groups": True}, "learn_groups is of pairs"),
        ({"loss_type": "kto", "dataset_streaming": True}, "dataset_streaming is of pairs"),
        ({"loss_type": "kto", "beta": -1.0}, "beta must be a positive"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        config_of(**options)


def test_the_embedded_data_are_pairs(tmp_path: Path, capsys: Capture) -> None:
    assert run("train", "--loss_type", "kto", "--output_dir", tmp_path / "run") == 2
    assert "the embedded data are pairs" in capsys.readouterr().err


def test_a_reference_that_moves(tmp_path: Path) -> None:
    """sync_ref_model: z is against the reference as it is now."""
    config = config_of(
        loss_type="kto",
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        max_steps=3,
        learning_rate=1e-2,
    )
    policy = tiny_policy()
    data, _ = references(Referee(policy, config, QUIET), completions(8), [], tmp_path, None)
    metrics = MetricsFile(tmp_path / "m.jsonl")
    loop.train(policy, data, None, config, metrics, QUIET)
    for row in metrics.rows:  # the reference is the policy again at each step
        assert row["kl"] == pytest.approx(0, abs=1e-4)
        assert row["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_dry_run(model: str, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    file = write(tmp_path / "rows.jsonl", labelled(12))
    code = run(*args(model, file, tmp_path / "run", "--loss_type", "kto", "--dry_run"))
    assert code == 0
    assert "labelled completions to train on" in capsys.readouterr().out


# --- what judges give to losses of pairs ---


def soft_rows(n: int) -> list[dict[str, Any]]:
    return [
        {**row, "p_chosen": [0.5, 0.8, 1.0][i % 3], "margin": [0.0, 0.4, 2.0][i % 3]}
        for i, row in enumerate(chats(n))
    ]


@pytest.mark.parametrize("loss_type", ["sigmoid", "sppo_soft", "odpo"])
def test_what_a_judge_says_reaches_the_loss(
    model: str,  # noqa: F811
    tmp_path: Path,
    loss_type: str,
) -> None:
    """p_chosen as label_smoothing, and the margin as ODPO's offset: losses of a step by hand."""
    rows = soft_rows(9)
    file, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    more = ["--loss_type", loss_type, "--max_steps", "2", "--eval_fraction", "0", "--beta", "0.5"]
    more += [] if loss_type == "odpo" else ["--soft_labels"]
    more += ["--per_device_train_batch_size", "9", "--lr_scheduler_type", "constant"]
    assert run(*args(model, file, out, *more)) == 0
    zero = torch.zeros(9)
    given: dict[str, Any] = {"loss_type": loss_type, "beta": 0.5}
    if loss_type == "odpo":
        given["offset"] = torch.tensor([row["margin"] for row in rows])
    else:
        given["label_smoothing"] = torch.tensor([1 - row["p_chosen"] for row in rows])
    expected = dk.preference_loss(zero, zero, zero, zero, **given).loss
    first, second = read_metrics(out / "metrics.jsonl")
    assert first["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert second["loss"] != pytest.approx(float(expected), rel=1e-6)
    hard = dk.preference_loss(zero, zero, zero, zero, loss_type="sppo_hard", beta=0.5).loss
    assert loss_type != "sppo_soft" or abs(float(expected - hard)) > 0.1


def test_soft_labels_need_a_probability(
    model: str,  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
) -> None:
    file = write(tmp_path / "rows.jsonl", chats(4))
    assert run(*args(model, file, tmp_path / "run", "--soft_labels")) == 2
    assert "p_chosen: missing, expected a probability in [0.5, 1]" in capsys.readouterr().err
    file = write(tmp_path / "rows.jsonl", [{**row, "p_chosen": 0.2} for row in chats(4)])
    assert run(*args(model, file, tmp_path / "run", "--soft_labels")) == 2
    assert "p_chosen: 0.2, expected a probability" in capsys.readouterr().err
    file = write(tmp_path / "rows.jsonl", soft_rows(4))
    assert run(*args(model, file, tmp_path / "r2", "--soft_labels", "--loss_type", "ipo")) == 2
    assert "does not fit the loss" in capsys.readouterr().err


def test_a_row_of_the_step_zero_check(tmp_path: Path) -> None:
    """Another policy than the reference is found, of single completions as well."""
    config = config_of(loss_type="kto")
    rows = completions(6)
    policy = tiny_policy()
    data, _ = references(Referee(policy, config, QUIET), rows, [], tmp_path, None)
    with torch.no_grad():
        next(policy.model.parameters()).mul_(1.5)
    with pytest.raises(loop.TrainingError, match="must equal the reference"):
        loop.check_step0(policy, data, config, range(4))
    assert loss_of(policy, config).function.state is None
