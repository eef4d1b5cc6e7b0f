"""The embedded default's own: its recipe, its model, and what that is taught before the pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import LeftOut, embedded, read_conversations, tokenize_conversations
from ..models.versions import dtype_option
from .config import DPOTrainConfig, load_config
from .console import Console
from .model import Policy, prepare_policy
from .order import steps_of
from .sft import taught


def embedded_layers() -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of DPO, options of SFT) of the embedded default's recipe."""
    recipe = embedded.recipe()
    seed = {"seed": recipe["seed"]} if "seed" in recipe else {}
    sample = {f"sample_{k}": v for k, v in recipe.get("sample", {}).items()}
    return {**seed, **recipe["dpo"], **sample}, {**seed, **recipe["sft"]}


def small_model(source: Path, config: DPOTrainConfig, say: Callable[[str], None]) -> Policy:
    """A fresh model of the embedded configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(source), **dtype_option(dtype)
    )
    say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, new")
    return prepare_policy(model, AutoTokenizer.from_pretrained(source), config, say)


def teach(
    policy: Policy,
    source: Path,
    num_pairs: int,
    left_out: LeftOut,
    config: DPOTrainConfig,
    folder: Path,
    console: Console,
) -> None:
    """Teach the fresh model the language of the data before it learns preferences."""
    dpo, sft = embedded_layers()
    mine = ("dtype", "device", "max_length", "backend")
    supervised = load_config({k: getattr(config, k) for k in mine}, sft)
    rows = read_conversations(source / "sft.jsonl", left_out)
    sequences = tokenize_conversations(rows, policy.tokenizer, supervised.max_length, left_out)
    whole, steps = steps_of(len(sequences), supervised), config.sft_steps
    if config.max_steps == 0 and steps is None:
        steps = 0
    if steps is None:
        # A run cut short is cut short here as well: the recipe's two parts keep their ratio.
        share = steps_of(num_pairs, config) / steps_of(num_pairs, load_config(dpo))
        steps = max(1, round(whole * min(share, 1.0)))
    if steps < whole:
        console.say(f"SFT: {steps} steps of the recipe's {whole} (--sft_steps sets them)")
        warmup = min(supervised.warmup_steps, steps // 4)
        supervised = replace(supervised, max_steps=max(steps, 1), warmup_steps=warmup)
    elif steps > whole:
        supervised = replace(supervised, max_steps=steps)
    if steps:
        taught(policy, sequences, supervised, folder, console)
