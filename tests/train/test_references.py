"""References of training: the policy as it starts, a model of its own, one that stays (TDPO)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import chats, model, refused, run  # noqa: F401 (model is a fixture)
from test_data import byte_tokenizer, random_pairs, write
from test_train import QUIET, config_of, one_thread, tiny_model, tiny_policy  # noqa: F401

import dpo_kernels as dk
from dpo_kernels.train import loop
from dpo_kernels.train.metrics import MetricsFile, read_metrics
from dpo_kernels.train.reference import LiveReference, Referee

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_trains_against_a_frozen_copy(name: str, tmp_path: Path) -> None:
    """Two steps: the loss is that of the functions, from both models' states."""
    options = {"loss_type": name, "max_steps": 2, "learning_rate": 1e-2}
    config = config_of(**options)
    policy = tiny_policy(**options)
    pairs = random_pairs(4)
    data = Referee(policy, config, QUIET).data(pairs, "")
    assert isinstance(data.reference, LiveReference) and data.reference.whole
    reference = data.reference.reference
    assert reference.model is not policy.model
    metrics = MetricsFile(tmp_path / "m.jsonl")
    before = [p.clone() for p in reference.model.parameters()]
    loop.train(policy, data, data, config, metrics, QUIET)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.model.parameters(), strict=True))
    assert metrics.rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    found = loop.evaluate(policy, data, config, QUIET, "")
    batch = policy.batch(pairs)
    ref = reference.head_arguments()
    with torch.no_grad():
        truth = dk.fused_linear_dpo_loss(
            policy.hidden(batch),
            labels=batch.labels,
            cu_seqlens=batch.cu_seqlens,
            shift=False,
            ref_hidden=reference.hidden(batch),
            ref_weight=ref["weight"],
            ref_bias=ref["bias"],
            loss_type=name,
            **policy.head_arguments(),
        )
    assert found["eval_loss"] == pytest.approx(float(truth.loss), rel=1e-5)
    assert float(truth.loss) < math.log(2)


def other_model(folder: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    other = tiny_model(**options)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    other.save_pretrained(folder)
    return folder


def test_a_reference_of_its_own(model: str, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """Its log-probs, and no demand that the policy be the same before the first step."""
    file = write(tmp_path / "p.jsonl", chats(8))
    ref = other_model(tmp_path / "ref")
    args = ("train", "--model_name_or_path", model, "--dataset_name", file, "--device", "cpu")
    args += ("--max_length", "64", "--max_steps", "1", "--logging_steps", "1")
    more = ("--ref_model_name_or_path", ref, "--output_dir", tmp_path / "run")
    assert run(*args, *more) == 0, capsys.readouterr().err
    (row,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert abs(row["loss"] - math.log(2)) > 1e-3
    said = capsys.readouterr().out  # rewards are no ties before training, and nothing says so
    assert "prefers the\nchosen.\n" in said and "every pair is a tie" not in said
    assert run(*args, *more[:2], "--loss_type", "tdpo1", "--output_dir", tmp_path / "tdpo") == 0


def test_references_that_do_not_fit(model: str, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    file = write(tmp_path / "p.jsonl", chats(4))
    args = ("train", "--model_name_or_path", model, "--dataset_name", file, "--device", "cpu")
    args += ("--output_dir", tmp_path / "run", "--ref_model_name_or_path")
    assert "ref_model_name_or_path: ./none cannot be loaded" in refused(capsys, *args, "./none")
    small = other_model(tmp_path / "small", vocab_size=100)
    assert "knows 100 token ids" in refused(capsys, *args, small)
    ref = other_model(tmp_path / "ref")
    byte_tokenizer(merges=[("a", "b")]).save_pretrained(ref)
    assert "another tokenizer" in refused(capsys, *args, ref)
    assert not (tmp_path / "run").exists()
    line = refused(capsys, "train", "--ref_model_name_or_path", ref)
    assert "a model and pairs of your own" in line
