"""What is known of transformers' causal LMs: logit scales, shared-prompt attention, adapters.

The training loop and the integrations both run a trunk (the model without its head) and hand its
hidden states to the fused head. What a model's own forward does besides stands here once.

Letters: `H` hidden size, `V` vocabulary, `r` rank of an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .data import ScoredBatch

# What the ops take; a head of another dtype (int8, uint8, float8) is a quantised one.
_HEAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Names under which configurations (and DBRX's model) keep the weight of the router's loss.
_ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
# How far, relative to the largest, a logit may move when a later token changes: rounding.
_CAUSAL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5}
_HALF_CAUSAL_TOLERANCE = 2e-2


class HeadParts(NamedTuple):
    """An lm_head as the linear front functions take it."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora: tuple[Tensor, Tensor, float] | None  # A [r, H], B [V, r], scaling


def unwrapped(model: Any) -> Any:
    """The model below DDP, DataParallel, FSDP1, DeepSpeed and torch.compile; PEFT stays."""
    while not hasattr(type(model), "get_output_embeddings"):
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            break
        model = inner
    return model


def base_model_of(model: nn.Module) -> Any:
    """The causal LM below PEFT and below what wraps it."""
    model = unwrapped(model)
    if hasattr(model, "get_base_model"):
        return model.get_base_model()  # type: ignore[operator]
    if "base_model" in model._modules and hasattr(model, "peft_config"):  # PeftMixedModel
        return model.base_model.model  # type: ignore[union-attr]
    return model


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, so without any of its noise; every module's mode is put back.

    The mode is what all noise asks for (dropout, NEFTune's hook, router jitter, layerdrop, LoRA's
    dropout), whatever the attribute that holds its rate is called.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        # A module with a train() of its own may do more than set the flag, or set others' flags.
        for module, training in modes:
            if type(module).train is not nn.Module.train:
                module.train(training)
        for module, training in modes:
            module.training = training


def check_decoder_only(config: Any, name: str) -> None:
    """`ValueError` for an encoder-decoder, whose answers do not follow the prompt in one row."""
    text = None if config is None else text_config(config)
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text)):
        raise ValueError(
            f"{name} is an encoder-decoder (config.is_encoder_decoder); expected a decoder-only "
            "causal language model"
        )


@torch.no_grad()
def check_causal(logits_of: Callable[[Tensor], Tensor], ids: Tensor, name: str) -> None:
    """`ValueError` if another last token of `ids` [1, T] changes the logits before it.

    A masked language model, or a decoder that was not told to be one, sees the answer it scores.
    """
    others = ids[ids != ids[0, -1]]
    if not others.numel():  # a vocabulary of one
        return
    other = ids.clone()
    other[:, -1] = others[0]
    before, after = (logits_of(x)[:, :-1] for x in (ids, other))
    moved = float((before - after).abs().max() / before.abs().max().clamp(min=1e-30))
    if not moved <= _CAUSAL_TOLERANCE.get(before.dtype, _HALF_CAUSAL_TOLERANCE):
        raise ValueError(
            f"{name}: the logits of a token change with the tokens behind it (relative {moved:.2g})"
            ": this is no causal language model (a masked one, or is_decoder=False)"
        )


def router_loss_weight(model: Any) -> float:
    """Weight of a mixture of experts' load-balancing loss; 0 where the model has none.

    As TRL: by the configuration's coefficient, whether or not `output_router_logits` is on.
    """
    text = text_config(model.config)
    if not hasattr(text, "output_router_logits") or _load_balancing_loss(model) is None:
        return 0.0
    for place in (text, model):
        for name in _ROUTER_WEIGHTS:
            value = getattr(place, name, None)
            if isinstance(value, (int, float)):
                return float(value)
    return 0.0


def router_loss(
    model: Any, router_logits: tuple[Tensor, ...] | None, attention_mask: Tensor | None
) -> Tensor:
    """[] the load-balancing loss as the model's own forward adds it (without its weight)."""
    function = _load_balancing_loss(model)
    if function is None:
        raise ValueError(
            f"{type(model).__name__}: output_router_logits is on, but no load_balancing_loss_func "
            "is found beside its class; set the configuration's output_router_logits=False"
        )
    text = text_config(model.config)
    experts = getattr(model, "num_experts", None)
    if experts is None:
        experts = getattr(text, "num_experts", None) or text.num_local_experts
    top_k = getattr(model, "num_experts_per_tok", None) or text.num_experts_per_tok
    # 0 for a model that has no layer of experts, as in its own forward.
    loss = function(router_logits or None, experts, top_k, attention_mask)
    return torch.as_tensor(loss)


def _load_balancing_loss(model: Any) -> Callable[..., Any] | None:
    """The function of that name beside the model's class."""
    for kind in type(model).__mro__:
        module = sys.modules.get(kind.__module__)
        if hasattr(module, "load_balancing_loss_func"):
            return module.load_balancing_loss_func  # type: ignore[union-attr]
    return None


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
        return HeadParts(*_linear_parts(head), None)
    tuner: Any = head
    weight, bias = _linear_parts(tuner.get_base_layer())
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


def check_head_kind(head: Any) -> None:
    """`ValueError` for a head that is no linear layer or is quantised, before anything runs."""
    _linear_parts(head.get_base_layer() if hasattr(head, "get_base_layer") else head, whole=False)


def _linear_parts(head: Any, whole: bool = True) -> tuple[Tensor, Tensor | None]:
    """weight [V, H] and bias of a linear layer; `ValueError` for what is none or is quantised.

    `whole`: no framework has cut the weight up, so its shape must be right.
    """
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    found = ""
    if not isinstance(weight, Tensor):
        found = "which has no weight"
    elif weight.dtype not in _HEAD_DTYPES:
        found = f"whose weight is {weight.dtype}: it is quantised"
    elif is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor"):
        found = f"whose weight is a {type(weight).__name__}: it is quantised"
    elif whole and weight.dim() != 2 and not hasattr(weight, "ds_id"):
        found = f"whose weight has shape {list(weight.shape)}"
    elif bias is not None and not isinstance(bias, Tensor):
        found = f"whose bias is a {type(bias).__name__}"
    if found:
        raise ValueError(
            f"the head (lm_head, get_output_embeddings()) is a {type(head).__name__}, {found}; "
            "expected a linear layer with a weight [V, H] in float32, bfloat16, float16 or "
            "float64 (LoRA on it is fine; leave it out of quantisation)"
        )
    return weight, bias  # type: ignore[return-value]


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
    trunk: nn.Module,
    attention: str,
    dtype: torch.dtype,
    batch: ScoredBatch,
    router: list[tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """[N, H] hidden states that predict the scored tokens of `batch`.

    `router` gets each call's router logits, a tensor [tokens, experts] for each layer of experts.
    """
    states = []
    for call in batch.calls:
        mask = call.mask
        if mask is not None and attention == "eager":
            # eager attention adds its mask to the scores: 0 where seen, the lowest number else
            low = torch.finfo(dtype).min
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, low)
        # Without position_ids and mask a plain row is causal: right padding changes nothing.
        extra = {} if mask is None else {"attention_mask": mask, "position_ids": call.position_ids}
        if router is not None:
            extra["output_router_logits"] = True  # type: ignore[assignment]
        output = trunk(input_ids=call.input_ids, use_cache=False, **extra)
        if router is not None and output.router_logits:
            router.append(tuple(layer.flatten(0, -2) for layer in output.router_logits))
        states.append(output.last_hidden_state.flatten(0, 1))
    return (states[0] if len(states) == 1 else torch.cat(states)).index_select(0, batch.rows)


def router_loss_of_calls(
    model: Any, router: list[tuple[Tensor, ...]], batch: ScoredBatch
) -> Tensor:
    """[] the load-balancing loss over the real tokens of all calls; no row may be a shared one."""
    layers = tuple(torch.cat(parts) for parts in zip(*router, strict=True))
    ends = batch.rows[batch.cu_seqlens[1:] - 1]  # [2B] where the last token is predicted
    masks, start = [], 0
    for call in batch.calls:
        R, S = call.input_ids.shape
        here = ends[(ends >= start) & (ends < start + R * S)] - start
        lengths = torch.zeros(R, dtype=torch.int64, device=ends.device)
        lengths[here // S] = here % S + 2
        masks.append((torch.arange(S, device=ends.device) < lengths[:, None]).flatten())
        start += R * S
    return router_loss(model, layers, torch.cat(masks)[None].long())
