"""The head check: once, before the first step, our log-probs against the model's own logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attached import HeadCall, attach_head
from .forward import score_tokens
from .lm_head import head_parts
from .options import FusedOptions
from .structure import deterministic, probe_ids

# Nats a token by which two ways to the same log-prob may differ.
_LOGP_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_LOGP_TOLERANCE = 0.25
# How far, relative to the largest, a logit may move when a later token changes: rounding.
_CAUSAL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5}
_HALF_CAUSAL_TOLERANCE = 2e-2


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


@torch.no_grad()
def check_head(model: nn.Module, backend: str | None = None) -> None:
    """Our log-probs against the model's own logits on twelve tokens; `ValueError` if they differ.

    It finds an architecture that does something to its logits which is not known here, and one
    whose tokens see those behind them.
    """
    base = attach_head(model)
    name = type(base).__name__
    head = base.get_output_embeddings()
    parts = head_parts(head)
    ids = torch.tensor([probe_ids(parts.weight.shape[0], 12)], device=parts.weight.device)
    mask = torch.ones_like(ids)

    def logits_of(ids: Tensor) -> Tensor:
        try:
            return base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        except TypeError as error:
            # Not asked of the signature: a forward that was replaced may show another's.
            if "use_cache" not in str(error):
                raise
            return base(input_ids=ids, attention_mask=mask).logits

    autocast = []  # whether the model's forward, which may be wrapped, computes in half

    def look(*_: Any) -> None:
        autocast.append(torch.is_autocast_enabled(ids.device.type))

    with deterministic(base):
        with head.register_forward_pre_hook(look):
            logits = logits_of(ids)
        own = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        fused = FusedOptions(backend=backend)
        call = HeadCall(functools.partial(score_tokens, labels=ids, fused=fused), ids.shape[1])
        ours = base(input_ids=ids, attention_mask=mask, dpo_head=call).logps
        again = logits_of(ids)
        if bool(torch.equal(again, logits)):
            check_causal(logits_of, ids, name)
    worst = float((own - ours).abs().max())
    allowed = _LOGP_TOLERANCE.get(logits.dtype, _HALF_LOGP_TOLERANCE)
    if any(autocast):  # a wrapper may have widened the logits again
        allowed = _HALF_LOGP_TOLERANCE
    if not worst <= allowed:
        if math.isnan(worst):
            raise ValueError(
                f"{name}: the model's own log-probs of {ids.shape[1]} tokens are not finite: its "
                f"weights are damaged, or overflow in {logits.dtype}"
            )
        noise = float((again - logits).abs().max())
        why = (
            f"the model draws noise in eval mode too (logits differ by {noise:.3g} from call to "
            "call)"
            if noise
            else "this architecture does something to its logits that is not known here "
            "(soft-capping and logit scales are)"
        )
        raise ValueError(
            f"{name}: lm_head(trunk) and the model's own logits differ by {worst:.3g} nats: {why}"
        )
