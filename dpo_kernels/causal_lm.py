"""What is known of transformers' causal LMs: logit scales, shared-prompt attention, adapters.

The training loop and the integrations both run a trunk (the model without its head) and hand its
hidden states to the fused head. What a model's own forward does besides stands here once.

Letters: `H` hidden size, `V` vocabulary, `r` rank of an adapter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .data import ScoredBatch


class HeadParts(NamedTuple):
    """An lm_head as the linear front functions take it."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora: tuple[Tensor, Tensor, float] | None  # A [r, H], B [V, r], scaling


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def head_scaling(config: Any) -> dict[str, float]:
    """logit_scale and logit_softcap by the names of the model's configuration."""
    text = text_config(config)
    scaling = {}
    if getattr(text, "final_logit_softcapping", None):  # Gemma
        scaling["logit_softcap"] = float(text.final_logit_softcapping)
    # Cohere; Muse Glimmer; Falcon-H1
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            scaling["logit_scale"] = float(getattr(text, name))
            return scaling
    if getattr(text, "logits_scaling", None):
        value = float(text.logits_scaling)
        # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
        scaling["logit_scale"] = value if text.model_type == "hyperclovax" else 1.0 / value
    return scaling


def head_parts(head: nn.Module) -> HeadParts:
    """Weight, bias and active LoRA adapters of an lm_head; `ValueError` for other adapters.

    Several active adapters are one: their A stacked, scaled, their B side by side.
    """
    if not hasattr(head, "get_base_layer"):  # a plain layer, or PEFT's fully trained copy of one
        return HeadParts(head.weight, getattr(head, "bias", None), None)  # type: ignore[arg-type]
    tuner: Any = head
    base = tuner.get_base_layer()
    weight, bias = base.weight, getattr(base, "bias", None)
    if tuner.disable_adapters or tuner.merged:
        return HeadParts(weight, bias, None)
    name = type(tuner).__name__
    if not hasattr(tuner, "lora_A"):
        raise ValueError(f"lm_head carries an adapter of type {name}; only LoRA is known here")
    active = [a for a in tuner.active_adapters if a in tuner.lora_A]
    for adapter in active:
        if getattr(tuner, "lora_variant", {}).get(adapter) or tuner.use_dora.get(adapter):
            raise ValueError(
                f"lm_head: adapter {adapter!r} is a variant of LoRA (DoRA or the like)"
            )
        if getattr(tuner, "lora_bias", {}).get(adapter):
            raise ValueError(f"lm_head: adapter {adapter!r} has lora_bias=True, which is not known")
        dropout = getattr(tuner.lora_dropout[adapter], "p", 0.0)
        if dropout and tuner.training:
            raise ValueError(
                f"lm_head: adapter {adapter!r} has lora_dropout={dropout}; set it to 0"
            )
    if not active:
        return HeadParts(weight, bias, None)
    downs = [tuner.lora_A[a].weight for a in active]
    ups = [tuner.lora_B[a].weight for a in active]
    scales = [float(tuner.scaling[a]) for a in active]
    if len(active) == 1:
        return HeadParts(weight, bias, (downs[0], ups[0], scales[0]))
    down = torch.cat([d * s for d, s in zip(downs, scales, strict=True)])
    return HeadParts(weight, bias, (down, torch.cat(ups, 1), 1.0))


def no_sharing(config: Any) -> str:
    """Why one 4-D mask cannot stand for this model's attention; empty if it can."""
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"{attention} takes no 4-D mask (sdpa and eager do)"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"the model has layers of type {', '.join(sorted(kinds))}"
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None and window:
        return f"the model attends within a sliding window of {config.sliding_window}"
    return ""


def attention_ratio(trunk: nn.Module, embedding: nn.Module | None, config: Any) -> float:
    """Cost of one attention entry over that of one token, as `data.Sharing` wants it."""
    body = sum(p.numel() for p in trunk.parameters() if p.dim() == 2)
    if embedding is not None:
        body -= embedding.weight.numel()  # type: ignore[operator]
    return 2 * config.hidden_size * config.num_hidden_layers / max(body, 1)


def trunk_states(
    trunk: nn.Module, attention: str, dtype: torch.dtype, batch: ScoredBatch
) -> Tensor:
    """[N, H] hidden states that predict the scored tokens of `batch`."""
    states = []
    for call in batch.calls:
        mask = call.mask
        if mask is not None and attention == "eager":
            # eager attention adds its mask to the scores: 0 where seen, the lowest number else
            low = torch.finfo(dtype).min
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, low)
        # Without position_ids and mask a plain row is causal: right padding changes nothing.
        extra = {} if mask is None else {"attention_mask": mask, "position_ids": call.position_ids}
        output = trunk(input_ids=call.input_ids, use_cache=False, **extra)
        states.append(output.last_hidden_state.flatten(0, 1))
    return (states[0] if len(states) == 1 else torch.cat(states)).index_select(0, batch.rows)
