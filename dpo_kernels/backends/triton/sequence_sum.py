"""Weighted sums over the scored tokens of each sequence, in fp64 and in order: a program each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import VARYING, on

BLOCK = 1024


@triton.jit
def _bounds(cu_seqlens, s, T, N, PACKED: tl.constexpr):
    if PACKED:
        first = tl.load(cu_seqlens + s).to(tl.int64)
        end = tl.load(cu_seqlens + s + 1).to(tl.int64)
        # Boundaries that point outside are cut: nothing is read or written out of bounds.
        return tl.minimum(tl.maximum(first, 0), N), tl.minimum(tl.maximum(end, 0), N)
    return s * T, (s + 1) * T


@triton.jit
def _count(targets, first, end, ignore_index, BLOCK: tl.constexpr):
    n = tl.zeros([BLOCK], tl.int64)
    for start in tl.range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        y = tl.load(targets + i, mask=i < end, other=ignore_index)
        n += (y != ignore_index).to(tl.int64)
    return tl.sum(n, 0)


@triton.jit(do_not_specialize=VARYING)
def _kernel(
    targets,
    cu_seqlens,
    values,
    sums,
    counts,
    grad,
    d_values,
    T,
    N,
    S,
    ignore_index,
    tail_weight,
    PACKED: tl.constexpr,
    TAIL: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    first, end = _bounds(cu_seqlens, s, T, N, PACKED)
    head = tl.full([], 9223372036854775807, tl.int64)
    if TAIL:
        partner_first, partner_end = _bounds(cu_seqlens, (s + S // 2) % S, T, N, PACKED)
        head = tl.minimum(
            _count(targets, first, end, ignore_index, BLOCK),
            _count(targets, partner_first, partner_end, ignore_index, BLOCK),
        )
    total = tl.full([], 0.0, tl.float64)
    seen = tl.full([], 0, tl.int64)
    for start in tl.range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        y = tl.load(targets + i, mask=i < end, other=ignore_index)
        scored = y != ignore_index
        count = scored.to(tl.int64)
        weight = tl.full([BLOCK], 1.0, tl.float64)
        if TAIL:
            rank = seen + tl.cumsum(count, 0) - count
            weight = tl.where(rank < head, 1.0, tl.zeros([], tl.float64) + tail_weight)
        counted = scored & (weight != 0.0)
        if BACKWARD:
            g = tl.load(grad + s)
            d = tl.where(counted, g * weight, 0.0)
            # An overflowing gradient saturates; NaN stays NaN.
            d = tl.where(d > 3.4028234663852886e38, 3.4028234663852886e38, d)
            d = tl.where(d < -3.4028234663852886e38, -3.4028234663852886e38, d)
            tl.store(d_values + i, d.to(tl.float32), mask=i < end)
        else:
            x = tl.load(values + i, mask=counted, other=0.0).to(tl.float64)
            total += tl.sum(x * weight, 0)
        seen += tl.sum(count, 0)
    if not BACKWARD:
        tl.store(sums + s, total)
        tl.store(counts + s, seen)


def _launch(targets, cu_seqlens, values, sums, counts, grad, d_values, ignore_index, tail) -> None:
    R, T = targets.shape
    S = R if cu_seqlens is None else cu_seqlens.numel() - 1
    if S == 0:
        return
    with on(targets):
        _kernel[(S,)](
            targets,
            cu_seqlens,
            values,
            sums,
            counts,
            grad,
            d_values,
            T,
            R * T,
            S,
            ignore_index,
            float(tail),
            PACKED=cu_seqlens is not None,
            TAIL=tail != 1.0,
            BACKWARD=d_values is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )


def sequence_sum(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
) -> tuple[Tensor, Tensor]:
    """As `backends.torch.sequence_sum`."""
    S = targets.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    sums = values.new_empty(S, dtype=torch.float64)
    counts = values.new_empty(S, dtype=torch.int64)
    _launch(
        targets.contiguous(),
        cu_seqlens,
        values.contiguous(),
        sums,
        counts,
        None,
        None,
        ignore_index,
        tail_weight,
    )
    return sums, counts


def sequence_sum_backward(
    grad: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
    dtype: torch.dtype,
) -> Tensor:
    """As `backends.torch.sequence_sum_backward`."""
    d_values = grad.new_zeros(targets.shape, dtype=torch.float32)
    _launch(
        targets.contiguous(),
        cu_seqlens,
        None,
        None,
        None,
        grad.double().contiguous(),
        d_values,
        ignore_index,
        tail_weight,
    )
    return d_values.to(dtype)
