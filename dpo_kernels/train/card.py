"""The model card, `model/README.md`: from what, on what, with which loss a model was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .config import DPOTrainConfig

_MEASURES = (
    ("loss", "eval_loss"),
    ("reward accuracy", "eval_rewards/accuracies"),
    ("reward margin", "eval_rewards/margins"),
    ("log-prob accuracy", "eval_logps/accuracies"),
)


def write_card(folder: Path, config: DPOTrainConfig, summary: dict[str, Any], loss: str) -> None:
    """Write the card of a run into its model's folder."""
    (folder / "README.md").write_text(card(config, summary, loss), encoding="utf-8")


def card(config: DPOTrainConfig, summary: dict[str, Any], loss: str) -> str:
    base = config.model_name_or_path or "a new model (the embedded default)"
    head: dict[str, Any] = {
        "library_name": "peft" if config.use_peft else "transformers",
        "tags": ["dpo", "preference-optimization", "dpo-kernels"],
    }
    if config.model_name_or_path:
        head["base_model"] = config.model_name_or_path
    data = config.dataset_name or "the embedded pairs"
    rows = {
        "base": base,
        "data": f"{data}: {summary['pairs']:,} {config.noun}, "
        f"{summary['held_out_pairs']:,} held out",
        "loss": f"{loss}, beta {config.beta:g}",
        "reference": _reference(config),
        "trained": _trained(config),
        "steps": f"{summary['steps']:,} of {_batch(config)} {config.noun}, {config.optim}, "
        f"learning rate {config.learning_rate:g} ({config.lr_scheduler_type})",
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
    }
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", ""]
    lines += ["# Trained with dpo-kernels", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in rows.items()]
    if summary.get("before") and summary.get("after"):
        lines += ["", "| held out | before | after |", "|---|---|---|"]
        for name, key in _MEASURES:
            before, after = summary["before"].get(key), summary["after"].get(key)
            if before is not None and after is not None:
                lines.append(f"| {name} | {before:.4f} | {after:.4f} |")
    calibration = summary.get("calibration")
    if calibration:
        lines += [
            "",
            f"Calibration of the implicit reward on {calibration['pairs']:,} held-out pairs: "
            f"temperature {calibration['temperature']:.3g}, expected calibration error "
            f"{calibration['ece_before']:.3f} without it and {calibration['ece_after']:.3f} with.",
        ]
    return "\n".join(lines) + "\n"


def _batch(config: DPOTrainConfig) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def _reference(config: DPOTrainConfig) -> str:
    if config.reference_free:
        return "none (reference_free)"
    other = getattr(config, "reference_name", None)
    if other:
        return str(other)
    return "the base model" if config.use_peft else "the model before training"


def _trained(config: DPOTrainConfig) -> str:
    weights = f"{config.dtype} weights" + (", bfloat16 arithmetic" if config.bf16 else "")
    if config.ema_decay:
        weights += f"; their moving average (decay {config.ema_decay:g}) is what is here"
    if not config.use_peft:
        return weights
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return f"{kind} adapter, rank {config.lora_r}, alpha {config.lora_alpha}; {weights}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def versions() -> dict[str, str]:
    """The packages that a run's numbers depend on."""
    from importlib import metadata

    found = {}
    for name in ("dpo-kernels", "torch", "transformers", "triton", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
