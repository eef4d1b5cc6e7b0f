"""A tiny model, tokenizer and preference data for the frameworks' trainers: no download."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_kernels.models.versions import transformers_before

WORDS = 62
NEEDS_SEGMENTS = pytest.mark.skipif(
    transformers_before(4, 55), reason="transformers before 4.55 takes padded rows"
)


def tokenizer() -> Any:
    """One token a word: w0 .. w61, <pad>, <eos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def model(kind: str = "Llama", dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any):
    """A causal LM of two layers with random weights."""
    import transformers

    torch.manual_seed(seed)
    common = dict(
        vocab_size=WORDS + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    config = getattr(transformers, f"{kind}Config")(**{**common, **options})
    made = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # random weights as they come give almost flat distributions
        made.get_output_embeddings().weight.mul_(8.0)
    return made.to(dtype)


def save(folder: Path, made: Any) -> str:
    """The model and the tokenizer as a folder that trainers load by name."""
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def rows(n: int = 12, seed: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """Pairs of different lengths; `columns` name -> value of row i."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(low, high)))

    return [
        {"prompt": text(3, 9), "chosen": " " + text(2, 8), "rejected": " " + text(2, 8)}
        | {k: f(i) for k, f in columns.items()}
        for i in range(n)
    ]
