"""Small models, batches and steps in a layout: what the tests of segments share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="pip install transformers")

import transformers

from dpo_kernels.models.forward import pair_step
from dpo_kernels.models.options import FusedOptions
from dpo_kernels.models.versions import dtype_option, transformers_before

needs_segments = pytest.mark.skipif(
    transformers_before(4, 55), reason="transformers before 4.55 takes padded rows"
)

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4, "experts_implementation": "eager"}
NO_AUX = {"router_aux_loss_coef": 0.0}


def tiny(name: str = "Llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    experts = options.pop("experts_implementation", None)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    extra = {"experts_implementation": experts} if experts else {}
    made = transformers.AutoModelForCausalLM.from_config(config, **dtype_option(dtype), **extra)
    return made.train()


def padded_batch(
    shapes: list[tuple[int, int, int]], device: str = "cpu", seed: int = 0, left: bool = False
) -> dict[str, torch.Tensor]:
    """[chosen; rejected] of (prompt, chosen, rejected) lengths, labels at the completions."""
    g = torch.Generator().manual_seed(seed)
    rows: tuple[list, list] = ([], [])
    for P, C, R in shapes:
        prompt = torch.randint(3, 90, (P,), generator=g)
        for side, n in enumerate((C, R)):
            rows[side].append((P, torch.cat([prompt, torch.randint(3, 90, (n,), generator=g)])))
    every = rows[0] + rows[1]
    T = max(len(row) for _, row in every)
    ids, labels = torch.zeros(len(every), T, dtype=torch.int64), torch.full((len(every), T), -100)
    mask = torch.zeros_like(ids)
    for i, (P, row) in enumerate(every):
        at = slice(T - len(row), T) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
        labels[i, at] = torch.where(torch.arange(len(row)) < P, -100, row)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {k: v.to(device) for k, v in batch.items()}


# Long beside the windows of 7 below, a prompt of one token, a long prompt, equal lengths.
SHAPES = [(12, 9, 5), (1, 4, 11), (20, 3, 6), (9, 6, 6)]


def step(model: Any, batch: dict[str, Any], layout: str, **options: Any) -> tuple[Any, list[Any]]:
    """(loss and log-probs, gradients) of a step in a layout."""
    model.zero_grad(set_to_none=True)
    fused = FusedOptions(layout=layout, head_stats=False, **options)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    out = pair_step(model, inputs, batch["labels"], None, {"reference_free": True}, fused)
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return out, grads


def same(model: Any, batch: dict[str, Any], layout: str, tolerance: float) -> None:
    reference, expected = step(model, batch, "padded")
    out, grads = step(model, batch, layout)
    assert float((out.loss - reference.loss).abs()) <= tolerance * float(reference.loss.abs())
    torch.testing.assert_close(out.pair_logps, reference.pair_logps, rtol=tolerance, atol=tolerance)
    assert any(g is not None and g.norm() > 0 for g in expected)
    for one, two in zip(grads, expected, strict=True):
        if one is None or two is None:
            assert one is None and two is None
            continue
        assert (one - two).norm() <= tolerance * two.norm().clamp(min=1e-6)
