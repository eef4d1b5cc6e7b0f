"""One trunk pass over the prompt that chosen and rejected share.

Our own batches (`data.batches`) are laid out so. Under a trainer that knows nothing of it a padded
batch [chosen; rejected] comes in: the common start of rows i and B + i is found from the ids, the
trunk runs over shared rows, and its states go back to [2B, T, H]. Where rows share nothing (a
prompt cut from the left, say) they run as they are.

Letters: `B` pairs, `T` positions, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ScoredBatch, Sharing, TokenPair, make_batch
from ..data.batches import CPU_CALL_TOKENS
from .experts import router_loss_weight
from .structure import deterministic, probe_ids, text_config, trunk_of


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
    model: Any,
    trunk: nn.Module,
    batch: ScoredBatch,
    router: list[tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """[N, H] hidden states that predict the scored tokens of `batch`.

    `router` gets each call's router logits, a tensor [tokens, experts] for each layer of experts.
    """
    states = []
    for call in batch.calls:
        mask = call.mask
        if mask is not None and text_config(model.config)._attn_implementation == "eager":
            # eager attention adds its mask to the scores: 0 where seen, the lowest number else
            dtype = next(p.dtype for p in trunk.parameters() if p.is_floating_point())
            low = torch.finfo(dtype).min
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, low)
        # Without position_ids and mask a plain row is causal: right padding changes nothing.
        extra = {} if mask is None else {"attention_mask": mask, "position_ids": call.position_ids}
        if router is not None:
            extra["output_router_logits"] = True  # type: ignore[assignment]
        output = trunk(input_ids=call.input_ids, use_cache=False, **extra)
        if router is not None and (layers := getattr(output, "router_logits", None)):
            router.append(tuple(layer.flatten(0, -2) for layer in layers))
        states.append(output.last_hidden_state.flatten(0, 1))
    return (states[0] if len(states) == 1 else torch.cat(states)).index_select(0, batch.rows)


# How far, relative to the largest, a hidden state may lie from that of the other layout.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.05


def choose_sharing(model: Any, layout: str, say: Callable[[str], None]) -> Sharing:
    """How pairs are laid out for this model; `ValueError` for "prefix" where it cannot be.

    `layout`: "padded", "prefix" or "auto", which says why a model stays with padded rows.
    """
    embedding, trunk = model.get_input_embeddings(), trunk_of(model)
    calls = CPU_CALL_TOKENS if embedding.weight.device.type == "cpu" else None
    padded = Sharing("padded", call_tokens=calls)
    if layout == "padded":
        return padded
    text = text_config(model.config)
    reason = no_sharing(text)
    if router_loss_weight(model):
        reason = "the router's load-balancing loss counts every token"
    reason = reason or _sharing_differs(model, trunk, embedding)
    if not reason:
        return Sharing(layout, attention_ratio(trunk, embedding, text), calls)
    if layout == "prefix":
        raise ValueError(f"batch_layout=prefix: {reason}; use padded or auto")
    say(f"prompts are not shared between chosen and rejected: {reason}")
    return padded


@torch.no_grad()
def _sharing_differs(model: Any, trunk: nn.Module, embedding: Any) -> str:
    """Compare both layouts on one short pair (this also finds recurrent and ALiBi models)."""
    weight = embedding.weight
    ids = tuple(probe_ids(weight.shape[0], 14))
    pair = TokenPair(ids[:5], ids[5:8], ids[8:14], "probe")
    states = []
    with deterministic(model):
        for mode in ("padded", "prefix"):
            batch = make_batch([pair], Sharing(mode), 0).to(weight.device)
            try:
                states.append(trunk_states(model, trunk, batch))
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                return f"the model refuses a 4-D mask ({str(error).splitlines()[0]})"
    worst = float((states[0] - states[1]).abs().max() / states[0].abs().max())
    if not worst <= _TOLERANCE.get(states[0].dtype, _HALF_TOLERANCE):
        return f"the model's states differ under a shared prompt (relative {worst:.2g})"
    return ""


_ALLOWED = {"input_ids", "attention_mask", "use_cache", "output_router_logits", "return_dict"}


def shared_states(model: Any, trunk: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """[2B, T, H] last hidden states, 0 at padding and at a row's last token (it predicts nothing).

    `ValueError` for a model, input or mask whose rows cannot be shared.
    """
    if args:
        kwargs = {"input_ids": args[0], **kwargs}
    ids = kwargs.get("input_ids")
    extra = {k for k, v in kwargs.items() if v is not None} - _ALLOWED
    if ids is None or extra:
        got = ", ".join(sorted(extra)) or "no input_ids"
        raise ValueError(f"share_prefix takes input_ids and attention_mask alone, got {got}")
    config = text_config(model.config)
    reason = no_sharing(config)
    if reason:
        raise ValueError(f"share_prefix: {reason}; set share_prefix=False")
    lengths = _lengths(ids, kwargs.get("attention_mask"))
    rows = [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)]
    B = len(rows) // 2
    # Without a prompt all but the first token count as scored: the states of all but the last.
    pairs = [TokenPair((), tuple(a), tuple(b), "") for a, b in zip(rows[:B], rows[B:], strict=True)]
    ratio = attention_ratio(trunk, model.get_input_embeddings(), config)
    calls = CPU_CALL_TOKENS if ids.device.type == "cpu" else None
    batch = make_batch(pairs, Sharing("auto", ratio, calls), 0).to(ids.device)
    states = trunk_states(model, trunk, batch)
    place = torch.tensor(lengths, device=ids.device)[:, None] - 1
    wanted = torch.arange(ids.shape[1], device=ids.device)[None] < place
    out = states.new_zeros(*ids.shape, states.shape[-1])
    return out.masked_scatter(wanted[..., None], states)


def _lengths(ids: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each row; rows must be padded on the right."""
    R, T = ids.shape
    if R % 2:
        raise ValueError(f"share_prefix needs [chosen; rejected], an even number of rows, got {R}")
    if mask is None:
        return [T] * R
    lengths = mask.sum(-1)
    right = torch.arange(T, device=mask.device)[None] < lengths[:, None]
    if mask.dim() != 2 or not torch.equal(mask.bool(), right):
        raise ValueError("share_prefix needs rows padded on the right, got another attention_mask")
    return lengths.tolist()
