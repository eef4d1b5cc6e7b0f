"""Twenty steps of `dpo-kernels train` beside plain TRL's trainer: the same metrics to 1e-4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import prepare
from test_cli import chats
from test_data import write
from test_train import one_thread  # noqa: F401 (a fixture)

from dpo_kernels.cli import main
from dpo_kernels.train.metrics import read_metrics

trl = pytest.importorskip("trl", reason="pip install trl")
pytest.importorskip("peft", reason="pip install peft")

SAME = (
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
OPTIONS: dict[str, Any] = {
    "max_steps": 20,
    "learning_rate": 2e-3,
    "beta": 0.2,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "max_length": 128,
    "warmup_steps": 3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "sequential",
    "seed": 5,
}
LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture
def same_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters start from the same random numbers in both trainers."""
    import peft

    plain = peft.get_peft_model

    def seeded(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(7)
        return plain(*args, **kwargs)

    monkeypatch.setattr(peft, "get_peft_model", seeded)
    monkeypatch.setattr(trl.trainer.dpo_trainer, "get_peft_model", seeded)


def trls(folder: Path, lora: dict[str, Any] | None) -> list[dict[str, Any]]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        **OPTIONS,
    )
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None,
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "lora",
    [None, LORA, {**LORA, "use_dora": True, "target_modules": "all-linear"}],
    ids=["full", "lora", "dora"],
)
def test_twenty_steps(tmp_path: Path, lora: dict[str, Any] | None, same_adapters: None) -> None:
    """DoRA: its magnitudes are vectors, and decayed all the same."""
    prepare(tmp_path)
    # Whole batches alone: of a short last one TRL takes the mean of unequal batches' means.
    write(tmp_path / "pairs.jsonl", chats(18))
    theirs = trls(tmp_path, lora)
    options = {
        **OPTIONS,
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "run",
        "eval_fraction": 0,
        "device": "cpu",
    }
    for name, value in (lora or {}).items():
        ours = {"r": "lora_r", "target_modules": "lora_target_modules"}.get(name, name)
        options |= {"use_peft": True, ours: value}
    assert main(["train", *(f"--{name}={value}" for name, value in options.items())]) == 0
    ours = read_metrics(tmp_path / "run/metrics.jsonl")
    assert len(ours) == len(theirs) == 20
    for mine, other in zip(ours, theirs, strict=True):
        for name in SAME:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), (
                mine["step"],
                name,
            )
    assert ours[-1]["loss"] < 0.6 < ours[0]["loss"]
