"""A policy of a few thousand weights with the embedded tokenizer, saved once a session."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny(folder: Path, seed: int = 0, labels: int | None = None) -> str:
    """A causal LM, or a classifier of so many `labels`."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    from dpo_kernels.data import embedded

    with embedded.folder() as source:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 64, 1
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 16
    torch.manual_seed(seed)
    if labels is None:
        model = AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
