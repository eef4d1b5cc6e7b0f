"""Short runs of a DPOTrainer, TRL's own or ours, on a tiny model: history and final weights."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from datasets import Dataset

from dpo_kernels.integrations import frameworks

VERSION = frameworks.check_version("trl", allow_untested=True)
# The shape of TRL 0.29 and 1.x.
V1 = hasattr(frameworks.require("trl.trainer.dpo_trainer").DPOTrainer, "_compute_loss")


@dataclass
class Run:
    history: list[dict[str, float]]  # one entry a step
    weights: dict[str, torch.Tensor]
    trainer: Any


def lora(**options: Any) -> Any:
    """A LoRA configuration on the attention of the tiny models."""
    from peft import LoraConfig

    common = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(task_type="CAUSAL_LM", **{**common, **options})


def config(folder: str | None = None, **options: Any) -> Any:
    """A DPOConfig that logs every step, on the CPU, in the model's own dtype."""
    from trl import DPOConfig

    common = dict(
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        seed=3,
        disable_tqdm=True,
    )
    if V1 and isinstance(options.get("loss_type"), str):
        options["loss_type"] = [options["loss_type"]]
    return DPOConfig(folder or tempfile.mkdtemp(), **{**common, **options})


def make(
    trainer: type,
    model: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    data: Any = None,
    ref_model: Any = "copy",
    peft_config: Any = None,
    fused: Any = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer; the reference is a copy of the model unless said otherwise or PEFT has it."""
    model = tiny.model(dtype=dtype) if model is None else model
    extra = dict(trainer_options or {})
    if fused is not None:
        extra["fused"] = fused
    if peft_config is not None:
        # PEFT casts adapters of a model that is not fp32 back to fp32 otherwise
        extra["peft_config"] = peft_config
    if ref_model == "copy":
        alone = peft_config is not None or hasattr(model, "peft_config")
        ref_model = None if alone else copy.deepcopy(model)
    return trainer(
        model=model,
        ref_model=ref_model,
        args=config(**options),
        train_dataset=Dataset.from_list(tiny.rows() if data is None else data),
        processing_class=tiny.tokenizer(),
        **extra,
    )


def run(trainer: type, **options: Any) -> Run:
    """Train and collect."""
    made = make(trainer, **options)
    made.train()
    history = [row for row in made.state.log_history if "loss" in row]
    weights = {k: v.detach().clone() for k, v in made.model.state_dict().items()}
    return Run(history, weights, made)


NOT_COMPARED = {"step_time", "total_flos"}


def assert_same(theirs: Run, ours: Run, tolerance: float, weight_tolerance: float) -> None:
    """Every metric of every step, and the final weights."""
    assert len(theirs.history) == len(ours.history) > 0
    for step, (a, b) in enumerate(zip(theirs.history, ours.history, strict=True)):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        for name in a.keys() - NOT_COMPARED:
            if name == "rewards/accuracies" and step == 0:
                continue  # rewards are 0 but for rounding, whose sign is no result
            scale = 1 + abs(a[name])
            assert abs(a[name] - b[name]) <= tolerance * scale, (step, name, a[name], b[name])
    for name, value in theirs.weights.items():
        worst = (value - ours.weights[name]).abs().max().item()
        assert worst <= weight_tolerance, (name, worst)
