"""What `pairs` writes trains in TRL unchanged, and KTO's numbers are those of TRL's trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import chat, save_tiny

import dpo_kernels as dk
from dpo_kernels.cli import main
from dpo_kernels.iterate.records import write_table

trl = pytest.importorskip(
    "trl", reason="needs trl (an environment of its own)", exc_type=ImportError
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("policy"))


def load(policy: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)


QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False}


def train_on(rows: list[dict[str, Any]], kind: str, policy: str, folder: Path, *more: str) -> float:
    """The loss of TRL's trainer of a `kind` on the file that `pairs` makes of samples."""
    from datasets import load_dataset

    write_table(folder / "s.jsonl", rows)
    files = ["--samples", str(folder / "s.jsonl")]
    assert main(["judge", *files, "--output", str(folder / "v.jsonl")]) == 0
    files += ["--verdicts", str(folder / "v.jsonl"), *more]
    out = folder / "rows.jsonl"
    assert main(["pairs", *files, "--output", str(out), "--select", "all"]) == 0
    data = load_dataset("json", data_files=str(out), split="train", cache_dir=str(folder / "c"))
    model, tokenizer = load(policy)
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        **QUIET,
    )
    trainer = getattr(trl, f"{kind}Trainer")
    trainer = trainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    return trainer.train().training_loss


@pytest.mark.parametrize("conversational", [True, False])
def test_pairs_train_in_trl(policy: str, tmp_path: Path, conversational: bool) -> None:
    rows = [
        {
            "prompt": chat(f"place {i}") if conversational else f"place {i}: ",
            "completion": "nice " * (n + 1),
            "sample": n,
        }
        for i in range(4)
        for n in range(3)
    ]
    assert math.isfinite(train_on(rows, "DPO", policy, tmp_path))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_as_trl_computes_it(policy: str, tmp_path: Path, loss_type: str) -> None:
    from datasets import Dataset

    rows = [
        {
            "prompt": chat(f"place {i}"),
            "label": bool(i % 3),
            "completion": [{"role": "assistant", "content": "word " * (1 + i % 4)}],
        }
        for i in range(8)
    ]
    model, tokenizer = load(policy)
    reference, _ = load(save_tiny(tmp_path / "ref", seed=3))
    config = trl.KTOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        loss_type=loss_type,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        beta=0.5,
        precompute_ref_log_probs=False,
        **QUIET,
    )
    trainer = trl.KTOTrainer(
        model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for batch in trainer.get_train_dataloader():
        theirs = trainer.compute_loss(trainer.model, batch)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        known = {"attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            logits = [m(batch["input_ids"], **known).logits for m in (trainer.model, reference)]
        z = None
        if loss_type == "kto":
            other = batch["KL_input_ids"].masked_fill(batch["KL_completion_mask"] == 0, -100)
            known = {"attention_mask": batch["KL_attention_mask"]}
            with torch.no_grad():
                both = [
                    dk.sequence_logps(m(batch["KL_input_ids"], **known).logits, other)
                    for m in (trainer.model, reference)
                ]
            z = dk.kl_baseline(*both)
        ours = dk.fused_unpaired_loss(
            logits[0],
            labels,
            logits[1],
            desirable=torch.as_tensor(batch["label"]).bool(),
            z=z,
            loss_type=loss_type,
            beta=0.5,
            desirable_weight=1.3,
            undesirable_weight=0.7,
        )
        torch.testing.assert_close(ours.loss, theirs.detach().float(), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("conversational", [True, False])
def test_our_unpaired_training_is_trls(
    policy: str, tmp_path: Path, loss_type: str, conversational: bool
) -> None:
    """A file of labelled completions trains in both, in file order: losses, z and rewards agree."""
    from datasets import load_dataset

    from dpo_kernels.train.metrics import read_metrics

    rows = []
    for i in range(12):
        said: Any = "word " * (1 + i % 4) + "end"
        rows.append(
            {
                "prompt": chat(f"place {i}") if conversational else f"place {i}: ",
                "completion": [{"role": "assistant", "content": said}] if conversational else said,
                "label": bool(i % 3),
            }
        )
    file = tmp_path / "rows.jsonl"
    write_table(file, rows)
    shared: dict[str, Any] = {
        "loss_type": loss_type,
        "beta": 0.5,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 2e-3,
        "logging_steps": 1,
    }
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "c"))
    model, tokenizer = load(policy)
    config = trl.KTOConfig(
        output_dir=str(tmp_path / "theirs"),
        save_strategy="no",
        gradient_checkpointing=False,
        **QUIET,
        **shared,
    )
    trainer = trl.KTOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    ours = ["train", "--model_name_or_path", policy, "--dataset_name", str(file)]
    ours += ["--output_dir", str(tmp_path / "ours"), "--device", "cpu", "--eval_fraction", "0"]
    ours += ["--train_sampling_strategy", "sequential", "--sample_max_new_tokens", "0"]
    for name, value in shared.items():
        ours += [f"--{name}", str(value)]
    assert main(ours) == 0
    for a, b in zip(read_metrics(tmp_path / "ours" / "metrics.jsonl"), theirs, strict=True):
        names = ("loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "grad_norm")
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=3e-3, abs=3e-4), (name, a, b)
    if loss_type == "kto":
        assert theirs[-1]["kl"] > 0


def test_labelled_files_of_pairs_train_in_trl(policy: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": chat(f"place {i}"), "completion": "nice " * (n + 1), "sample": n}
        for i in range(4)
        for n in range(3)
    ]
    assert math.isfinite(train_on(rows, "KTO", policy, tmp_path, "--format", "unpaired"))
