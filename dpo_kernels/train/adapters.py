"""LoRA, rank-stabilised LoRA and DoRA through peft; QLoRA over weights of bitsandbytes.

The reference of a fresh adapter is the model below it. It is no second model: its log-probs are
taken once, before training, while the adapter does nothing. What is saved is the adapter alone.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from .config import DPOTrainConfig, UserError

_QUANTISED = ("load_in_4bit", "load_in_8bit")


def check_adapter(config: DPOTrainConfig, own: bool) -> None:
    """`UserError` for an adapter that cannot be trained, before a model is loaded."""
    asked = [name for name in _QUANTISED if getattr(config, name)]
    if len(asked) == 2:
        raise UserError("load_in_4bit and load_in_8bit: choose one of them")
    named = (Path(str(config.model_name_or_path)) / "adapter_config.json").is_file()
    if asked and not (config.use_peft or named):
        raise UserError(f"{asked[0]}: quantised weights are not trained; add use_peft (QLoRA)")
    if asked:
        _need("bitsandbytes", asked[0])
    if not config.use_peft:
        given = [n for n in _OPTIONS if getattr(config, n)]
        if given:
            raise UserError(f"{given[0]} is of an adapter: add use_peft")
        return
    if not own:
        raise UserError(
            "use_peft: the embedded default trains a new model, which an adapter cannot teach a "
            "language; pass model_name_or_path and dataset_name"
        )
    _need("peft", "use_peft")
    if config.lora_r < 1:
        raise UserError(f"lora_r must be at least 1, got {config.lora_r}")
    if named:
        raise UserError(
            f"use_peft adds an adapter, and model_name_or_path ({config.model_name_or_path}) is "
            "one already; leave use_peft out to train it on"
        )


def check_named(folder: str, name: str) -> None:
    """`UserError` unless the folder of a model has an adapter of this name (`ref_adapter_name`)."""
    known = sorted(p.parent.name for p in Path(folder).glob("*/adapter_config.json"))
    if name not in known:
        raise UserError(
            f"ref_adapter_name: {folder} has no adapter {name!r} below it, expected "
            + (f"one of {', '.join(known)}" if known else "the folder of a PEFT model of several")
        )


_OPTIONS = (
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


def _need(package: str, option: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:  # absent, or broken on this machine in its own way
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{option} needs {package} ({first}): pip install {package}") from None


def quantisation(config: DPOTrainConfig) -> Any:
    """transformers' configuration of the quantised weights asked for; None for none."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    plain = config.dtype if config.dtype != "auto" else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.bf16 else getattr(torch, plain),
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=config.bnb_4bit_quant_storage,
    )


def with_adapter(model: Any, config: DPOTrainConfig) -> Any:
    """The model with the fresh adapter that the configuration describes, or as it is."""
    quantised = config.load_in_4bit or config.load_in_8bit
    if quantised:
        _keep_differentiable(model)
    if not config.use_peft:
        return model
    import peft

    if quantised:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = config.lora_target_modules
    more: dict[str, Any] = {}
    if config.lora_target_parameters:
        more["target_parameters"] = config.lora_target_parameters
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,  # as TRL's disable_dropout: policy and reference are one function
        # One name is a pattern, as in TRL: "all-linear" is one of peft's own.
        target_modules=targets[0] if targets and len(targets) == 1 else targets,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
        **more,
    )
    try:
        return peft.get_peft_model(model, adapter)
    except (ValueError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"use_peft: {first} (lora_target_modules names the layers)") from None


def _keep_differentiable(model: Any) -> None:
    """bitsandbytes repacks 4-bit weights of a CPU for inference at the first forward without
    gradients (the reference's pass), and what is repacked has no backward."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def name_base(model: Any, name: str) -> None:
    """What the saved adapter says of its base model: the user's name for it."""
    if Path(name).exists():
        name = str(Path(name).absolute())
    for adapter in getattr(model, "peft_config", {}).values():
        if not adapter.base_model_name_or_path or Path(adapter.base_model_name_or_path).exists():
            adapter.base_model_name_or_path = name
