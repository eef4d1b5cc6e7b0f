"""The policy of round 0 where no model is given: the embedded model after its SFT recipe."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data import LeftOut, embedded, read_conversations, tokenize_conversations
from ..train.config import load_config
from ..train.console import Console
from ..train.metrics import MetricsFile
from ..train.model import prepare_policy, save_policy
from ..train.sft import train_sft


def embedded_start(folder: Path, seed: int, steps: int | None, console: Console) -> None:
    """Save the embedded model, fine-tuned by its recipe (or `steps` of it), as `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    recipe = embedded.recipe()
    layers = {"seed": seed, **({"max_steps": steps} if steps else {})}
    config = load_config(recipe["sft"], layers)
    with embedded.folder() as source:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        tokenizer = AutoTokenizer.from_pretrained(source)
        policy = prepare_policy(model, tokenizer, config, console.say)
        left_out = LeftOut()
        rows = read_conversations(source / "sft.jsonl", left_out)
        sequences = tokenize_conversations(rows, tokenizer, config.max_length, left_out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(folder.parent / "sft_metrics.jsonl")
    loss = train_sft(policy, sequences, config, metrics, console)
    console.say(f"SFT on {len(sequences)} conversations: loss {loss:.3f} per token")
    save_policy(policy, folder)
