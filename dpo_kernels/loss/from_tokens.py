"""One loss over the log-probs of tokens: what every front function ends with.

    token log-probs -> sequence sums -> pair loss

Policy and reference come as values a row. Letters: `B` pairs, `R` rows, `T` positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import losses as _losses
from .. import ops
from ..inputs.call import TokenCall, check_given_logps, reference_of
from ..ops import TokenLogps
from ..ops.direct import eager
from .at_once import from_logits, from_sums
from .from_pairs import DPOOutput, Pairs, loss_of


def sums_of(call: TokenCall, values: Tensor, tail: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sums [S] and counts [S] of values a row; `tail`: what LD-DPO's tokens weigh."""
    return ops.sequence_sum(
        values,
        call.layout.targets,
        call.layout.cu_seqlens,
        ignore_index=call.layout.ignore_index,
        tail_weight=tail,
        backend=call.backend,
    )


def shown(call: TokenCall, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those asked for, of statistics a row [R, T], in the shape users see."""
    return {name: call.layout.per_token(stats[name]) for name in call.settled.asked}


def reference_sums(call: TokenCall, tokens: Tensor | None) -> Tensor | None:
    """[S] of a reference's log-probs a row [R, T], or of those that were given."""
    if tokens is None:
        tokens = call.reference
        if tokens is None or tokens.dim() == 1:
            return tokens
    return sums_of(call, tokens, call.settled.tail)[0]


def check_one_reference(ref_logps: Tensor | None, beside: bool, name: str) -> None:
    if beside and ref_logps is not None:
        raise ValueError(f"give one of ref_logps and {name}, got both")


def given_sums(call: TokenCall, ref_logps: Tensor | None, per_token: bool | None) -> Tensor | None:
    """[S] of the reference's log-probs as the user gave them, for losses of no pairs."""
    if ref_logps is None:
        return None
    check_given_logps(call.layout, ref_logps, per_token)
    rows = reference_of(call.layout, ref_logps, per_token)
    return rows if rows is None or rows.dim() == 1 else sums_of(call, rows)[0]


def score(
    call: TokenCall, x: Tensor, stats: tuple[str, ...], ref_logits: Tensor | None = None
) -> TokenLogps:
    """Values a row of the policy's logits [R, T, V]."""
    y, _, ignore = call.place
    transform, inplace = call.settled.transform, call.inplace
    return ops.read_rows(x, y, ignore, transform, stats, inplace, call.backend, ref_logits)


def of_logits(call: TokenCall, x: Tensor) -> DPOOutput:
    """Loss and rewards from logits [R, T, V]."""
    ref, s = call.ref_logits, call.settled
    if call.direct:
        out, stats = from_logits(call, x, None if ref is not None else reference_sums(call, None))
        return out.told(None, shown(call, stats))
    tokens = None
    if ref is not None and not s.needs_kl:
        y, _, ignore = call.place
        tokens = ops.read_rows(ref, y, ignore, s.transform, (), False, call.ref_backend).logps
    return finish(call, score(call, x, s.stats, ref if s.needs_kl else None), tokens)


def finish(call: TokenCall, policy: TokenLogps, ref_tokens: Tensor | None = None) -> DPOOutput:
    """Loss and rewards from values a row [R, T]: of the policy, and those of the reference, which
    come with the KL where the loss needs it."""
    B, s = call.layout.sequences // 2, call.settled
    sums, counts = sums_of(call, policy.logps, s.tail)
    ref_tokens = policy.ref_logps if ref_tokens is None else ref_tokens
    reference = reference_sums(call, ref_tokens)
    if s.ordinary is not None and call.backend != "torch" and eager(sums):
        lengths = counts if s.ordinary.row.by_length else None
        return from_sums(call, sums, reference, lengths).told(None, shown(call, policy.stats))
    plain = sums if s.tail == 1.0 else sums_of(call, policy.logps)[0]
    reference = None if reference is None else reference.double()
    wpo = None
    if s.options.use_weighting:
        aligned = policy.logps.detach() - policy.stats["log_sum_sq_probs"]
        mean = sums_of(call, aligned)[0] / counts.clamp(min=1).double()
        wpo = (mean[:B] + mean[B:]).exp()
    kl = None if policy.kl is None else sums_of(call, policy.kl)[0]
    pairs = Pairs(
        chosen=sums[:B],
        rejected=sums[B:],
        ref_chosen=None if reference is None else reference[:B],
        ref_rejected=None if reference is None else reference[B:],
        chosen_lengths=counts[:B],
        rejected_lengths=counts[B:],
        chosen_nll=-plain[:B],
        wpo=wpo,
        chosen_kl=None if kl is None else kl[:B],
        rejected_kl=None if kl is None else kl[B:],
    )
    out = loss_of(pairs, s.options, s.losses, call.dtype, call.backend)
    return out.told(None, shown(call, policy.stats)) if s.asked else out


def share_of(
    call: TokenCall, first: int, last: int, num_chosen_tokens: float, **place: Any
) -> tuple[TokenCall, list[str]]:
    """The share of pairs first .. last - 1 in the loss of the whole batch, in fp64.

    `place` is their layout and their reference alone; `num_chosen_tokens` the batch's count of
    scored chosen tokens. Options that want a gradient come as leaves, named.
    """
    o, B = call.settled.options, call.layout.sequences // 2
    changes: dict[str, Any] = {
        "num_pairs": B if o.num_pairs is None else o.num_pairs,
        "num_chosen_tokens": (
            max(num_chosen_tokens, 1) if o.num_chosen_tokens is None else o.num_chosen_tokens
        ),
    }
    leaves = []
    for name in _losses.PER_PAIR:
        value = getattr(o, name)
        if not isinstance(value, Tensor):
            continue
        part = value.detach() if value.dim() == 0 else value.detach()[first:last]
        if value.requires_grad:
            # In fp64: the shares of the chunks, and of a list of losses, add up in it.
            part = part.double().clone().requires_grad_()
            leaves.append(name)
        changes[name] = part
    settled = replace(call.settled, options=replace(o, **changes), asked=(), ordinary=None)
    return TokenCall(settled, call.backend, torch.float64, **place), leaves


def reduce(call: TokenCall, tokens: TokenLogps, reduction: str) -> Any:
    """What `sequence_logps` returns."""
    if reduction == "none":
        logps = call.layout.per_token(tokens.logps)
    else:
        sums, counts = sums_of(call, tokens.logps)
        logps = sums / counts.clamp(min=1) if reduction == "mean" else sums
        logps = logps.to(tokens.logps.dtype)
    stats = shown(call, tokens.stats)
    return (logps, stats) if stats else logps
