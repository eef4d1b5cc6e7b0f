"""Log-probs of policy and reference, their KL, and the gradient of the policy's logits, in Triton.

As `token_logps.py`, over two rows at once. The tiles are counted from the boundary before the
policy's row; where the reference's lies otherwise against 16 bytes it is read element by element.
A lane sums, beside the two exponentials, gap = sum 2^((r - m_r) k) ((r - m_r) - (x - m_x)) of its
reference's and policy's values and maxima; when a maximum moves the gap moves with it. At the end

    KL = unit gap / l_r + log l_x - log l_r

whatever the maxima were. Letters as `ops/token_kl.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...inputs.transform import LogitTransform
from .launch import ALIGN, VARYING, aligned, lanes, on
from .token_logps import _ALIGN, _origin, _scalars, _scalars_backward, _value

# As in token_logps.py.
FORWARD = {"K": 1, "num_warps": 4}
BACKWARD = {"TILE": 1024, "num_warps": 2}


@triton.jit
def _scaled(gap, shrink):
    """shrink * gap, where an infinite gap stays infinite."""
    return tl.where(gap == float("inf"), gap, shrink * gap)


@triton.jit
def _move(m, top, k):
    """For a maximum that rises from m to top: base, how far it moved, how the sums shrink.

    A lane that has only seen -inf has nothing to subtract: -inf - -inf is NaN.
    """
    base = tl.where(top == -float("inf"), 0.0, top)
    drop = tl.where(m == -float("inf"), 0.0, m - base)
    return base, drop, tl.where(m == -float("inf"), 0.0, tl.exp2(drop * k))


@triton.jit
def _add_tile(
    mx,
    lx,
    mr,
    lr,
    gap,  # [LANES] running maxima and sums of both, and the gap
    row,
    ref_row,
    cols,
    head,
    end,
    inner,
    outer,
    k,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    if MASKED:
        inside = (cols >= head) & (cols < end)
        x = tl.load(row + cols, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(ref_row + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, _value(x, inner, outer, SOFTCAP), -float("inf"))
        r = tl.where(inside, _value(r, inner, outer, SOFTCAP), -float("inf"))
    else:
        x = _value(tl.load(row + cols).to(tl.float32), inner, outer, SOFTCAP)
        r = _value(tl.load(ref_row + cols).to(tl.float32), inner, outer, SOFTCAP)
    top_x = tl.maximum(mx, tl.max(x, 0))
    top_r = tl.maximum(mr, tl.max(r, 0))
    base_x, drop_x, shrink_x = _move(mx, top_x, k)
    base_r, drop_r, shrink_r = _move(mr, top_r, k)
    dx = x - base_x[None, :]
    dr = r - base_r[None, :]
    ex = tl.exp2(dx * k)
    er = tl.exp2(dr * k)
    if k == 0.0:  # logit_scale=0: flat, but what is outside the row still does not count
        ex = tl.where(x == -float("inf"), 0.0, ex)
        er = tl.where(r == -float("inf"), 0.0, er)
    # 0 log(0 / p) = 0, for p = 0 too; where only the policy has nothing it is infinite, however
    # small the reference's share.
    term = tl.where(x == -float("inf"), float("inf"), er * (dr - dx))
    term = tl.where(r == -float("inf"), 0.0, term)
    gap = _scaled(gap + lr * (drop_r - drop_x), shrink_r) + tl.sum(term, 0)
    return top_x, lx * shrink_x + tl.sum(ex, 0), top_r, lr * shrink_r + tl.sum(er, 0), gap


@triton.jit
def _meet(m, l, k):
    """The lanes' sums as one: maximum, how each lane moved and shrank, log of the sum (fp64).

    The terms of the maximum itself, 1 each, are counted apart, as in token_logps.py.
    """
    top = tl.max(m, 0)
    _, drop, shrink = _move(m, top, k)
    tied = m == top
    ones = tl.sum(tied.to(tl.float32), 0)
    rest = tl.sum(tl.where(tied, l - 1.0, l * shrink), 0)
    rest = tl.where(top == -float("inf"), float("nan"), rest)
    total = ones.to(tl.float64) + rest.to(tl.float64)
    return top, drop, shrink, total


@triton.jit(do_not_specialize=VARYING)
def _forward(
    logits,
    ref_logits,  # [R, T, V] at `shift` and `ref_shift`, strides (stride_r, stride_t, 1)
    targets,  # [R, T]
    logps,
    lse,
    ref_logps,
    ref_lse,
    kl,  # [R, T] fp32, fp64, fp32, fp64, fp32
    shift,
    stride_r,
    stride_t,
    ref_shift,
    ref_stride_r,
    ref_stride_t,
    T,
    V,
    ignore_index,
    inner,
    outer,
    k,
    unit_hi,
    unit_lo,
    SOFTCAP: tl.constexpr,
    SAME_PHASE: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + index)
    if (y == ignore_index) | (y < 0) | (y >= V):
        nothing = tl.where(y == ignore_index, 0.0, float("nan"))
        tl.store(logps + index, nothing)
        tl.store(ref_logps + index, nothing)
        tl.store(kl + index, nothing)
        tl.store(lse + index, nothing.to(tl.float64))
        tl.store(ref_lse + index, nothing.to(tl.float64))
    else:
        start = shift + (index // T) * stride_r + (index % T) * stride_t
        ref_start = ref_shift + (index // T) * ref_stride_r + (index % T) * ref_stride_t
        x_y = _value(tl.load(logits + start + y).to(tl.float32), inner, outer, SOFTCAP)
        r_y = _value(tl.load(ref_logits + ref_start + y).to(tl.float32), inner, outer, SOFTCAP)
        head = start % _ALIGN
        row = logits + tl.multiple_of(start - head, _ALIGN)
        ref_row = ref_logits + (ref_start - head)
        if SAME_PHASE:  # both rows lie alike within 16 elements: whole vectors of both
            ref_row = ref_logits + tl.multiple_of(ref_start - head, _ALIGN)
        end = head + V
        tile = K * LANES
        cols = tl.arange(0, K)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        mx = tl.full([LANES], -float("inf"), tl.float32)
        mr = tl.full([LANES], -float("inf"), tl.float32)
        lx = tl.zeros([LANES], tl.float32)
        lr = tl.zeros([LANES], tl.float32)
        gap = tl.zeros([LANES], tl.float32)
        mx, lx, mr, lr, gap = _add_tile(
            mx, lx, mr, lr, gap, row, ref_row, cols, head, end, inner, outer, k, SOFTCAP, True
        )
        inner_end = end // tile * tile
        for first in tl.range(tile, inner_end, tile):
            mx, lx, mr, lr, gap = _add_tile(
                mx,
                lx,
                mr,
                lr,
                gap,
                row,
                ref_row,
                first + cols,
                head,
                end,
                inner,
                outer,
                k,
                SOFTCAP,
                False,
            )
        if (end > tile) & (inner_end < end):
            mx, lx, mr, lr, gap = _add_tile(
                mx,
                lx,
                mr,
                lr,
                gap,
                row,
                ref_row,
                inner_end + cols,
                head,
                end,
                inner,
                outer,
                k,
                SOFTCAP,
                True,
            )
        top_x, drop_x, _, sum_x = _meet(mx, lx, k)
        top_r, drop_r, shrink_r, sum_r = _meet(mr, lr, k)
        unit = tl.zeros([], tl.float64) + unit_hi + unit_lo
        log_x = tl.log(sum_x)
        log_r = tl.log(sum_r)
        x_y, r_y = x_y.to(tl.float64) - top_x, r_y.to(tl.float64) - top_r
        tl.store(logps + index, (x_y * unit - log_x).to(tl.float32))
        tl.store(ref_logps + index, (r_y * unit - log_r).to(tl.float32))
        tl.store(lse + index, top_x.to(tl.float64) * unit + log_x)
        tl.store(ref_lse + index, top_r.to(tl.float64) * unit + log_r)
        # A lane without anything of the reference has no gap, however far its policy moved.
        moved = tl.where(lr == 0.0, 0.0, gap + lr * (drop_r - drop_x))
        sum_gap = tl.sum(_scaled(moved, shrink_r).to(tl.float64), 0)
        # Infinite where the policy has nothing, unless one of the rows is no distribution.
        value = sum_gap / sum_r * unit + (log_x - log_r)
        tl.store(kl + index, value.to(tl.float32))


@triton.jit
def _softmax(value, hi, rounding, k):
    return tl.exp2((value - hi) * k) * rounding


@triton.jit
def _values(row, cols, inside, inner, outer, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return _value(
            tl.load(row + cols, mask=inside, other=0.0).to(tl.float32), inner, outer, SOFTCAP
        )
    return _value(tl.load(row + cols).to(tl.float32), inner, outer, SOFTCAP)


@triton.jit
def _store_gradient(
    row,
    ref_row,
    row_out,
    cols,
    inside,
    first,
    y,
    g_logp,
    g_kl,
    lse,
    ref_lse,
    inner,
    outer,
    k,
    chain,
    unit,
    inverse,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    hi, rounding = _origin(lse, unit, inverse, k)
    x = _values(row, cols, inside, inner, outer, SOFTCAP, MASKED)
    p = _softmax(x, hi, rounding, k)
    d = -g_logp * p
    r = tl.zeros([TILE], tl.float32)
    if g_kl != 0.0:
        ref_hi, ref_rounding = _origin(ref_lse, unit, inverse, k)
        r = _values(ref_row, cols, inside, inner, outer, SOFTCAP, MASKED)
        d += g_kl * (p - _softmax(r, ref_hi, ref_rounding, k))
    if (y >= first) & (y < first + TILE):
        # 1 - p at the target without cancellation, from registers: another warp may already have
        # overwritten the target's logit in place.
        target = cols == y
        p_y = tl.exp(tl.sum(tl.where(target, x, 0.0), 0).to(tl.float64) * unit - lse)
        d_y = (1.0 - p_y) * g_logp.to(tl.float64)
        if g_kl != 0.0:
            r_y = tl.sum(tl.where(target, r, 0.0), 0).to(tl.float64)
            d_y += g_kl.to(tl.float64) * (p_y - tl.exp(r_y * unit - ref_lse))
        d = tl.where(target, d_y.to(tl.float32), d)
    d = d * chain
    if SOFTCAP:
        t = x / outer
        d = d * (1.0 - t) * (1.0 + t)
    if MASKED:
        tl.store(row_out + cols, d.to(row_out.dtype.element_ty), mask=inside)
    else:
        tl.store(row_out + cols, d.to(row_out.dtype.element_ty))


@triton.jit(do_not_specialize=VARYING)
def _backward(
    grad_logps,
    grad_kl,
    logits,
    ref_logits,
    targets,
    lse,
    ref_lse,
    out,
    shift,
    stride_r,
    stride_t,
    ref_shift,
    ref_stride_r,
    ref_stride_t,
    out_shift,
    out_stride_r,
    out_stride_t,
    T,
    V,
    ignore_index,
    inner,
    outer,
    k,
    unit_hi,
    unit_lo,
    inv_hi,
    inv_lo,
    chain,
    SOFTCAP: tl.constexpr,
    SAME_PHASE: tl.constexpr,
    TILE: tl.constexpr,
):
    # Rows backwards: the last rows the forward read may still lie in L2.
    index = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    first = tl.program_id(1) * TILE
    y = tl.load(targets + index)
    g_logp = tl.load(grad_logps + index)
    g_kl = tl.load(grad_kl + index)
    start = shift + (index // T) * stride_r + (index % T) * stride_t
    ref_start = ref_shift + (index // T) * ref_stride_r + (index % T) * ref_stride_t
    out_start = out_shift + (index // T) * out_stride_r + (index % T) * out_stride_t
    head = out_start % _ALIGN
    row_out = out + tl.multiple_of(out_start - head, _ALIGN)
    row = logits + (start - head)
    ref_row = ref_logits + (ref_start - head)
    if SAME_PHASE:
        row = logits + tl.multiple_of(start - head, _ALIGN)
        ref_row = ref_logits + tl.multiple_of(ref_start - head, _ALIGN)
    cols = first + tl.arange(0, TILE)
    inside = (cols >= head) & (cols < head + V)
    nothing = (g_logp == 0.0) & (g_kl == 0.0)
    if (y == ignore_index) | nothing | (y < 0) | (y >= V):
        legal = (y == ignore_index) | nothing
        fill = tl.full([TILE], 0.0, tl.float32) + tl.where(legal, 0.0, float("nan"))
        tl.store(row_out + cols, fill.to(out.dtype.element_ty), mask=inside)
    else:
        unit = tl.zeros([], tl.float64) + unit_hi + unit_lo
        inverse = tl.zeros([], tl.float64) + inv_hi + inv_lo
        row_lse = tl.load(lse + index)
        # A row whose KL is not wanted leaves the reference unread.
        row_ref_lse = tl.zeros([], tl.float64)
        if g_kl != 0.0:
            row_ref_lse = tl.load(ref_lse + index)
        if (first >= head) & (first + TILE <= head + V):
            _store_gradient(
                row,
                ref_row,
                row_out,
                cols,
                inside,
                first,
                y + head,
                g_logp,
                g_kl,
                row_lse,
                row_ref_lse,
                inner,
                outer,
                k,
                chain,
                unit,
                inverse,
                SOFTCAP,
                False,
                TILE,
            )
        else:
            _store_gradient(
                row,
                ref_row,
                row_out,
                cols,
                inside,
                first,
                y + head,
                g_logp,
                g_kl,
                row_lse,
                row_ref_lse,
                inner,
                outer,
                k,
                chain,
                unit,
                inverse,
                SOFTCAP,
                True,
                TILE,
            )


def _placed(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`aligned`, with the strides behind the shift: where rows lie."""
    base, shift = aligned(x)
    return base, (shift, *x.stride()[:2])


def _same_phase(first: tuple[int, ...], *others: tuple[int, ...]) -> bool:
    """Whether rows lie alike within `ALIGN` elements, wherever they start."""
    return all((a - b) % ALIGN == 0 for x in others for a, b in zip(first, x, strict=True))


def token_kl(
    logits: Tensor,  # [R, T, V]
    ref_logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    ignore_index: int,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `backends.torch.token_kl`."""
    R, T, V = logits.shape
    kinds = (torch.float32, torch.float64, torch.float32, torch.float64, torch.float32)
    logps, lse, ref_logps, ref_lse, kl = (logits.new_empty((R, T), dtype=kind) for kind in kinds)
    if R * T:
        (base, place), (ref_base, ref_place) = _placed(logits), _placed(ref_logits)
        with on(logits):
            _forward[(R * T,)](
                base,
                ref_base,
                targets.contiguous(),
                logps,
                lse,
                ref_logps,
                ref_lse,
                kl,
                *place,
                *ref_place,
                T,
                V,
                ignore_index,
                **_scalars(transform),
                SOFTCAP=transform.softcap != 0,
                SAME_PHASE=_same_phase(place, ref_place),
                **lanes(logits, FORWARD),
            )
    return logps, lse, ref_logps, ref_lse, kl


def token_kl_backward(
    grad_logps: Tensor,  # [R, T]
    grad_kl: Tensor,  # [R, T]
    logits: Tensor,  # [R, T, V]
    ref_logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    lse: Tensor,  # [R, T] fp64
    ref_lse: Tensor,  # [R, T] fp64
    ignore_index: int,
    transform: LogitTransform,
    out: Tensor,  # [R, T, V], may be `logits` or `ref_logits`
) -> None:
    """As `backends.torch.token_kl_backward`."""
    R, T, V = logits.shape
    if logits.numel() == 0:
        return
    # The first tile begins up to ALIGN - 1 elements before the row.
    tiles = triton.cdiv(V + ALIGN - 1, BACKWARD["TILE"])
    (base, place), (ref_base, ref_place) = _placed(logits), _placed(ref_logits)
    out_base, out_place = _placed(out)
    with on(logits):
        _backward[(R * T, tiles)](
            grad_logps.float().contiguous(),
            grad_kl.float().contiguous(),
            base,
            ref_base,
            targets.contiguous(),
            lse.contiguous(),
            ref_lse.contiguous(),
            out_base,
            *place,
            *ref_place,
            *out_place,
            T,
            V,
            ignore_index,
            **_scalars_backward(transform),
            SOFTCAP=transform.softcap != 0,
            SAME_PHASE=_same_phase(out_place, place, ref_place),
            **BACKWARD,
        )
