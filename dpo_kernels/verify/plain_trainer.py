"""DPO in plain torch and fp64, a row at a time: what the trainers under test are held to.

It shares no code with the package: one forward a sequence, `log_softmax`, the formula of the paper,
and gradient descent.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import EOS, Case, Row


def encode(row: Row, tokenizer: Any, max_length: int | None) -> list[tuple[list[int], int]]:
    """(ids, tokens of the prompt) of chosen and rejected; one EOS, the end cut off."""
    found = []
    prompt = tokenizer(row["prompt"])["input_ids"]
    for side in ("chosen", "rejected"):
        text = row["prompt"] + row[side]
        ids = tokenizer(text if text.endswith(EOS) else text + EOS)["input_ids"]
        found.append((ids[:max_length], len(prompt)))
    return found


def token_logps(model: Any, ids: list[int], start: int) -> Tensor:
    """Log-probs of the completion's tokens."""
    x = torch.tensor([ids])
    logps = model(input_ids=x).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, x[0, 1:, None])[start - 1 :, 0]


def log_ratios(model: Any, reference: Any, row: Row, tokenizer: Any, options: Any) -> Tensor:
    """[2] of chosen and rejected; tokens past the shorter one weigh `ld_alpha`."""
    sides = encode(row, tokenizer, options.get("max_length"))
    shared = min(len(ids) - start for ids, start in sides)
    alpha = options.get("ld_alpha")
    ratios = []
    for ids, start in sides:
        with torch.no_grad():
            theirs = token_logps(reference, ids, start)
        difference = token_logps(model, ids, start) - theirs
        weights = torch.ones_like(difference)
        if alpha is not None:
            weights[shared:] = alpha
        ratios.append((weights * difference).sum())
    return torch.stack(ratios)


def margins(
    model: Any, reference: Any, rows: Sequence[Row], tokenizer: Any, options: Any
) -> Tensor:
    """[rows] beta times the difference of the log-ratios."""
    beta = options.get("beta", 0.1)
    found = [log_ratios(model, reference, row, tokenizer, options) for row in rows]
    return beta * torch.stack([u - v for u, v in found])


def load(folder: str) -> tuple[Any, Any]:
    """(model in fp64, tokenizer)."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def descend(case: Case, steps: int) -> tuple[Any, Any, Any]:
    """(model after `steps` steps over all rows, reference, tokenizer)."""
    model, tokenizer = load(case.model)
    reference = copy.deepcopy(model)
    for _ in range(steps):
        gradients = gradient(model, reference, case, tokenizer)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= case.options["learning_rate"] * gradients[name]
    return model, reference, tokenizer


def gradient(model: Any, reference: Any, case: Case, tokenizer: Any) -> dict[str, Tensor]:
    """Of the mean loss of the rows."""
    model.zero_grad()
    found = margins(model, reference, case.rows, tokenizer, case.options)
    (-torch.nn.functional.logsigmoid(found).mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
