"""Prefix sharing under a trainer that knows nothing of it.

A padded batch [chosen; rejected] comes in; the common start of rows i and B + i is found from the
ids, the trunk runs over shared rows (`data.batches`), and its states go back to [2B, T, H]. Where
rows share nothing (a prompt cut from the left, say) they run as they are.

Letters: `B` pairs, `T` positions, `H` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..causal_lm import attention_ratio, no_sharing, text_config, trunk_states
from ..data import Sharing, TokenPair, make_batch
from ..data.batches import CPU_CALL_TOKENS

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
    dtype = next(p.dtype for p in trunk.parameters() if p.is_floating_point())
    states = trunk_states(trunk, config._attn_implementation, dtype, batch)
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
