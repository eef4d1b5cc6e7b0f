"""An ordinary loss at once: one autograd function from logits, or from sums, to loss and metrics.

It calls the backend's functions one after the other, without a graph of ops between them. For
eager calls whose `Call.direct` says so; the same function over hidden states is that of
`stream_pairs.py`. Letters: `S` = 2B sequences, `R` rows, `T` positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import load
from ..inputs.call import Call, TokenCall
from ..ops.derivatives import refuse_inplace
from ..ops.direct import eager
from ..ops.sequence_sum import backward_op as sums_backward
from ..ops.token_logps import backward_in_place, backward_op
from .from_pairs import DPOOutput, Pairs, loss_of


def from_logits(
    call: TokenCall, logits: Tensor, reference: Tensor | None
) -> tuple[DPOOutput, dict[str, Tensor]]:
    """The output of rows [R, T, V], and statistics a row; `reference` [S] if it has no logits."""
    kept: list[Any] = []
    loss = _FromLogits.apply(logits, call, reference, kept)
    fields, table = kept
    return DPOOutput(loss, *fields), dict(zip(call.settled.stats, table, strict=True))


class _FromLogits(torch.autograd.Function):
    """Token log-probs -> sums of sequences -> loss of pairs, and back."""

    @staticmethod
    def forward(ctx, logits, call: TokenCall, reference: Tensor | None, kept: list[Any]):
        impl, s = load(call.backend), call.settled
        assert s.ordinary is not None
        place = (*call.place, s.tail)
        if call.ref_logits is not None:
            y, _, ignore = call.place
            logps = impl.token_logps(call.ref_logits, y, ignore, s.transform, ())[0]
            reference, _ = impl.sequence_sum(logps, *place)
        rows = (logits, place, s.transform)
        lse, table, found = s.ordinary.of_rows(impl, *rows, s.stats, reference)
        loss, fields = s.ordinary.finish(impl, found, call.dtype)
        kept += [fields, () if table is None else table.unbind(0)]
        ctx.call = call
        ctx.save_for_backward(logits, lse, found)
        return loss

    @staticmethod
    def backward(ctx, g):
        # Reading saved_tensors compares versions: after an in-place backward this raises.
        logits, lse, found = ctx.saved_tensors
        call, s = ctx.call, ctx.call.settled
        y, cu, ignore = call.place
        t, ordinary = s.transform, s.ordinary
        if call.inplace:
            refuse_inplace()
        elif not torch.is_grad_enabled() and eager(g):
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            rows = (logits, (*call.place, s.tail), t)
            scale = ordinary.scale(g, found.shape[1])
            ordinary.rows_backward(load(call.backend), *rows, lse, found, scale, out)
            return out, None, None, None
        d = sums_backward(ordinary.scaled(found, g), y, cu, ignore, s.tail, call.backend)
        rest = (y, lse, ignore, t.scale, t.softcap, t.inv_temperature, call.backend)
        if call.inplace:
            target = logits.detach()
            backward_in_place(d, target, *rest)
            return target, None, None, None
        return backward_op(d, logits, *rest), None, None, None


def from_sums(
    call: Call, sums: Tensor, reference: Tensor | None, lengths: Tensor | None
) -> DPOOutput:
    """The output from sums [S] fp64 of the policy's log-probs, the reference's and the lengths."""
    kept: list[Any] = []
    loss = _FromSums.apply(sums, call, reference, lengths, kept)
    return DPOOutput(loss, *kept)


class _FromSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums, call: Call, reference, lengths, kept: list[Any]):
        ordinary = call.settled.ordinary
        assert ordinary is not None
        impl = load(call.backend)
        found = ordinary.of_sums(impl, sums, reference, lengths)
        loss, fields = ordinary.finish(impl, found, call.dtype)
        kept += fields
        ctx.call, ctx.rest = call, (reference, lengths)
        ctx.save_for_backward(sums, found)
        return loss

    @staticmethod
    def backward(ctx, g):
        sums, found = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can be differentiated
            loss = _composed(ctx.call, sums, *ctx.rest)
            (d,) = torch.autograd.grad(loss, sums, g, create_graph=True)
        else:
            d = ctx.call.settled.ordinary.scaled(found, g)
        return d, None, None, None, None


def _composed(call: Call, sums: Tensor, reference: Tensor | None, lengths: Tensor | None) -> Tensor:
    def halves(x: Tensor | None) -> Any:
        return (None, None) if x is None else x.chunk(2)

    reference = None if reference is None else reference.double()
    chosen, rejected = halves(sums)
    ref, counts = halves(reference), halves(lengths)
    pairs = Pairs(chosen, rejected, ref[0], ref[1], counts[0], counts[1], -chosen, None)
    s = call.settled
    return loss_of(pairs, s.options, s.losses, call.dtype, call.backend).loss
