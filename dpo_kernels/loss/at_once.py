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
        impl, y, cu, ignore, s = load(call.backend), *call.place, call.settled
        assert s.ordinary is not None
        logps, lse, table = impl.token_logps(logits, y, ignore, s.transform, s.stats)
        sums, counts = impl.sequence_sum(logps, y, cu, ignore, s.tail)
        if call.ref_logits is not None:
            logps = impl.token_logps(call.ref_logits, y, ignore, s.transform, ())[0]
            reference, _ = impl.sequence_sum(logps, y, cu, ignore, s.tail)
        found = s.ordinary.evaluate(impl, sums, reference, counts)
        kept += [s.ordinary.metrics(found, call.dtype), table.unbind(0) if s.stats else ()]
        ctx.call = call
        ctx.save_for_backward(logits, lse, found.slopes)
        return s.ordinary.loss(found.losses, call.dtype)

    @staticmethod
    def backward(ctx, g):
        # Reading saved_tensors compares versions: after an in-place backward this raises.
        logits, lse, slopes = ctx.saved_tensors
        call, s = ctx.call, ctx.call.settled
        t, impl = s.transform, load(call.backend)
        if call.inplace:
            refuse_inplace()
        y, cu, ignore = call.place
        d = s.ordinary.scaled(slopes, g)
        if not call.inplace and not torch.is_grad_enabled() and eager(d):
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            d = impl.sequence_sum_backward(d, y, cu, ignore, s.tail, torch.float32)
            impl.token_logps_backward(d, logits, y, lse, ignore, t, out)
            return out, None, None, None
        d = sums_backward(d, y, cu, ignore, s.tail, call.backend)
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
        found = ordinary.evaluate(load(call.backend), sums, reference, lengths)
        kept += ordinary.metrics(found, call.dtype)
        ctx.call, ctx.rest = call, (reference, lengths)
        ctx.save_for_backward(sums, found.slopes)
        return ordinary.loss(found.losses, call.dtype)

    @staticmethod
    def backward(ctx, g):
        sums, slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can be differentiated
            loss = _composed(ctx.call, sums, *ctx.rest)
            (d,) = torch.autograd.grad(loss, sums, g, create_graph=True)
        else:
            d = ctx.call.settled.ordinary.scaled(slopes, g)
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
