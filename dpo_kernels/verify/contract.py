"""What a trainer under test is given, and what it gives back.

A `Case` is a model folder, preference rows and options under TRL's names. The model has two layers
and random weights; its tokenizer has one token a word. So a run takes a second, and a mistake in a
gradient is as large as the gradient.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

WORDS = 62
EOS = "<eos>"

Row = Mapping[str, str]  # prompt, chosen, rejected


class NotApplicable(Exception):
    """The trainer has no such feature; the reason is shown."""


@dataclass(frozen=True)
class Case:
    """One run of a trainer.

    `options` are names and meanings of TRL's `DPOConfig`: `beta`, `loss_type`, `ld_alpha`,
    `precompute_ref_log_probs`, `per_device_train_batch_size`, `gradient_accumulation_steps`,
    `max_steps`, `max_length`, `learning_rate`, `optim` ("sgd" or "adamw_torch"), `save_steps`, ...
    The learning rate is constant, gradients are not clipped, the reference is the initial model,
    and dropout is left as the model has it.
    """

    model: str  # a folder with the policy and its tokenizer
    rows: tuple[Row, ...]
    folder: str  # of the run: whatever the trainer writes goes there
    options: Mapping[str, Any] = field(default_factory=dict)
    eval_rows: tuple[Row, ...] = ()
    layout: str = "padded"  # or "packed"
    processes: int = 1
    resume_from: str | None = None  # a checkpoint of an earlier run


@dataclass
class Trained:
    """What a run left."""

    weights: dict[str, Tensor]  # by the model's own names, full tensors
    evaluation: dict[str, float] = field(default_factory=dict)  # TRL's names: eval_loss, ...
    checkpoints: dict[int, str] = field(default_factory=dict)  # folder by step


class Target(Protocol):
    """A trainer under test."""

    name: str
    versions: str

    def train(self, case: Case) -> Trained:
        """Raises `NotApplicable` where it has no such feature."""
        ...

    def gradients(self, case: Case, sharding: str) -> dict[str, Tensor]:
        """Of the mean loss of `case.rows`, halved over two processes, the first half on rank 0.

        `sharding` is "fsdp2" (the head in the root unit) or "fsdp2, head apart". Called in each
        process of an initialised group; returns full tensors.
        """
        ...


def tokenizer() -> Any:
    """One token a word: <pad>, <eos>, w0 .. w61."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<pad>", EOS, *(f"w{i}" for i in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token=EOS)


def save_model(folder: Path, *, dropout: float = 0.0, seed: int = 0) -> str:
    """A Llama of two layers in fp32 with its tokenizer; the folder's name."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
        attention_dropout=dropout,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # as they come, random weights give almost flat distributions
        model.get_output_embeddings().weight.mul_(8.0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def make_rows(count: int, seed: int = 0, *, shortest: int = 2, longest: int = 9) -> tuple[Row, ...]:
    """Pairs of words drawn at random, of different lengths."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(low, high)))

    return tuple(
        {
            "prompt": text(3, 8),
            "chosen": " " + text(shortest, longest),
            "rejected": " " + text(shortest, longest),
        }
        for _ in range(count)
    )
