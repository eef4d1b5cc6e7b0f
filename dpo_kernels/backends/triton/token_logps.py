"""Log-prob and log-sum-exp of each scored row, and the gradient of the logits, in Triton.

Forward: one program a row, one read. A tile is [K, LANES]: each lane keeps its own running maximum
and sum and reduces over K in registers; the lanes meet once, after the loop. Backward: one program
a tile of a row, one read and one write.

A row may start anywhere (odd V, views), so tiles are counted from the boundary of 16 elements at
or before its start: inner tiles need no mask and load whole vectors, the first and the last are
masked. Values are subtracted from the maximum before they are scaled (fp32 keeps every digit near
it), and the log-sum-exp is fp64. `zz` is what is summed: softcap's output, or the logit itself with
the sign of the scale, so that z = zz * unit with unit >= 0. Letters as `ops/token_logps.py`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...transform import LogitTransform
from .launch import ALIGN, VARYING, on, placed, same_phase

# Launch configurations, one place: (K, LANES, warps) forward, (tile, warps) backward. Not yet
# measured on a GPU.
FORWARD = {"K": 8, "LANES": 1024, "num_warps": 4}
FORWARD_STATS = {"K": 4, "LANES": 1024, "num_warps": 8}  # six running values a lane: smaller tiles
BACKWARD = {"TILE": 4096, "num_warps": 4}
_ALIGN = tl.constexpr(ALIGN)


@triton.jit
def _tanh(a):
    """A polynomial near 0 (no cancellation), 1 - 2 / (exp(2a) + 1) elsewhere. After Cephes."""
    size = tl.abs(a)
    q = a * a
    p = -5.70498872745e-3
    p = p * q + 2.06390887954e-2
    p = p * q - 5.37397155531e-2
    p = p * q + 1.33314422036e-1
    p = p * q - 3.33332819422e-1
    near = a + a * q * p
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(a < 0, -far, far))


@triton.jit
def _value(x, inner, outer, SOFTCAP: tl.constexpr):
    """zz of a logit: outer * tanh(inner * x), or outer * x with outer = +-1."""
    if SOFTCAP:
        return outer * _tanh(x * inner)
    return outer * x


@triton.jit
def _add_tile(
    m, l, weighted, squares, total, beaten,  # [LANES] running maximum, sums, statistics
    row, cols, head, end, y, zy, inner, outer, k,
    SOFTCAP: tl.constexpr, STATS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if MASKED:
        inside = (cols >= head) & (cols < end)
        x = tl.load(row + cols, mask=inside, other=0.0).to(tl.float32)
        zz = tl.where(inside, _value(x, inner, outer, SOFTCAP), -float("inf"))
    else:
        zz = _value(tl.load(row + cols).to(tl.float32), inner, outer, SOFTCAP)
    top = tl.maximum(m, tl.max(zz, 0))
    # A lane that has only seen -inf has nothing to subtract: -inf - -inf is NaN.
    base = tl.where(top == -float("inf"), 0.0, top)
    d = zz - base[None, :]
    e = tl.exp2(d * k)
    if k == 0.0:  # logit_scale=0: flat, but what is outside the row still does not count
        e = tl.where(zz == -float("inf"), 0.0, e)
    drop = tl.where(m == -float("inf"), 0.0, m - base)
    shrink = tl.where(m == -float("inf"), 0.0, tl.exp2(drop * k))
    if STATS:
        # -inf times a weight of 0 is 0; a NaN still goes through `e`.
        near = tl.where(e == 0.0, 0.0, tl.maximum(d, -1e30))
        weighted = shrink * (weighted + l * drop) + tl.sum(e * near, 0)
        squares = shrink * shrink * squares + tl.sum(e * e, 0)
        column = cols - head
        tied = tl.where(zz == zy, 0.0, k) == 0.0  # flat, all are
        ahead = (zz > zy) | (tied & (column < y))
        if MASKED:
            total += tl.sum(tl.where(inside, zz, 0.0), 0)
            ahead = ahead & inside
        else:
            total += tl.sum(zz, 0)
        beaten = tl.maximum(beaten, tl.max(ahead.to(tl.int32), 0))
    l = l * shrink + tl.sum(e, 0)
    return top, l, weighted, squares, total, beaten


@triton.jit(do_not_specialize=VARYING)
def _forward(
    logits,  # [R, T, V], strides (stride_r, stride_t, 1), after `skip` elements
    targets,  # [R, T]
    logps, lse, stats,  # [R, T] fp32, [R, T] fp64, [4, R, T] fp32: entropy, mean, top1, squares
    skip, stride_r, stride_t, T, V, rows, ignore_index, inner, outer, k, unit_hi, unit_lo,
    SOFTCAP: tl.constexpr, STATS: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + index)
    if (y == ignore_index) | (y < 0) | (y >= V):
        nothing = tl.where(y == ignore_index, 0.0, float("nan"))
        tl.store(logps + index, nothing)
        tl.store(lse + index, nothing.to(tl.float64))
        if STATS:
            for i in tl.static_range(4):
                tl.store(stats + i * rows + index, nothing)
    else:
        start = skip + (index // T) * stride_r + (index % T) * stride_t
        zy = _value(tl.load(logits + start + y).to(tl.float32), inner, outer, SOFTCAP)
        head = start % _ALIGN
        row = logits + tl.multiple_of(start - head, _ALIGN)
        end = head + V
        tile = K * LANES
        cols = tl.arange(0, K)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        m = tl.full([LANES], -float("inf"), tl.float32)
        l = tl.zeros([LANES], tl.float32)
        weighted = tl.zeros([LANES], tl.float32)
        squares = tl.zeros([LANES], tl.float32)
        total = tl.zeros([LANES], tl.float32)
        beaten = tl.zeros([LANES], tl.int32)
        m, l, weighted, squares, total, beaten = _add_tile(
            m, l, weighted, squares, total, beaten, row, cols, head, end, y, zy, inner, outer, k,
            SOFTCAP, STATS, True,
        )  # fmt: skip
        inner_end = end // tile * tile
        for first in tl.range(tile, inner_end, tile):
            m, l, weighted, squares, total, beaten = _add_tile(
                m, l, weighted, squares, total, beaten, row, first + cols, head, end, y, zy,
                inner, outer, k, SOFTCAP, STATS, False,
            )  # fmt: skip
        if (end > tile) & (inner_end < end):
            m, l, weighted, squares, total, beaten = _add_tile(
                m, l, weighted, squares, total, beaten, row, inner_end + cols, head, end, y, zy,
                inner, outer, k, SOFTCAP, STATS, True,
            )  # fmt: skip
        top = tl.max(m, 0)
        base = tl.where(top == -float("inf"), 0.0, top)
        drop = tl.where(m == -float("inf"), 0.0, m - base)
        shrink = tl.where(m == -float("inf"), 0.0, tl.exp2(drop * k))
        # The terms of the maximum itself, 1 each, are counted apart: beside them the rest of a
        # confident row (1 - p) would be rounded away. A NaN sum stays NaN.
        tied = m == top
        ones = tl.sum(tied.to(tl.float32), 0)
        rest = tl.sum(tl.where(tied, l - 1.0, l * shrink), 0)
        rest = tl.where(top == -float("inf"), float("nan"), rest)
        sum_l = ones.to(tl.float64) + rest.to(tl.float64)
        unit = tl.zeros([], tl.float64) + unit_hi + unit_lo
        log_l = tl.log(sum_l)
        logp = (zy - top).to(tl.float64) * unit - log_l
        tl.store(logps + index, logp.to(tl.float32))
        tl.store(lse + index, top.to(tl.float64) * unit + log_l)
        if STATS:
            nan = tl.where(logp != logp, logp, 0.0)
            sum_w = tl.sum(shrink * (weighted + l * drop), 0)
            sum_s = tl.sum(shrink * shrink * squares, 0)
            entropy = log_l - sum_w.to(tl.float64) / sum_l * unit
            mean = tl.sum(total.to(tl.float64), 0) * unit / V
            is_top1 = 1.0 - tl.max(beaten, 0).to(tl.float64)
            log_squares = tl.log(sum_s.to(tl.float64)) - 2 * log_l
            tl.store(stats + index, (entropy + nan).to(tl.float32))
            tl.store(stats + rows + index, (mean + nan).to(tl.float32))
            tl.store(stats + 2 * rows + index, (is_top1 + nan).to(tl.float32))
            tl.store(stats + 3 * rows + index, (log_squares + nan).to(tl.float32))


@triton.jit
def _gradient(x, cols, y, g, hi, lse, inner, outer, k, chain, unit, rounding,
              SOFTCAP: tl.constexpr, HAS_TARGET: tl.constexpr):  # fmt: skip
    """-g dz/dx p, and at the target g dz/dx (1 - p) without cancellation."""
    zz = _value(x, inner, outer, SOFTCAP)
    slope = chain
    if SOFTCAP:
        t = zz / outer
        slope = chain * (1.0 - t) * (1.0 + t)
    d = tl.exp2((zz - hi) * k) * (-g * rounding) * slope
    if HAS_TARGET:
        # From registers: another warp may already have overwritten the target's logit in place.
        zy = tl.sum(tl.where(cols == y, zz, 0.0), 0)
        p = tl.exp(zy.to(tl.float64) * unit - lse)
        at_target = ((1.0 - p) * g.to(tl.float64)).to(tl.float32)
        d = tl.where(cols == y, at_target * slope, d)
    return d


@triton.jit(do_not_specialize=VARYING)
def _backward(
    grad, logits, targets, lse, out,  # [R, T], [R, T, V], [R, T], [R, T] fp64, [R, T, V]
    skip, stride_r, stride_t, out_skip, out_stride_r, out_stride_t, T, V, ignore_index,
    inner, outer, k, unit_hi, unit_lo, chain,
    SOFTCAP: tl.constexpr, SAME_PHASE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Rows backwards: the last rows the forward read may still lie in L2.
    index = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    first = tl.program_id(1) * TILE
    y = tl.load(targets + index)
    g = tl.load(grad + index)
    start = skip + (index // T) * stride_r + (index % T) * stride_t
    out_start = out_skip + (index // T) * out_stride_r + (index % T) * out_stride_t
    head = out_start % _ALIGN
    row_out = out + tl.multiple_of(out_start - head, _ALIGN)
    row = logits + (start - head)
    if SAME_PHASE:  # both rows lie alike within 16 elements: whole vectors in and out
        row = logits + tl.multiple_of(start - head, _ALIGN)
    cols = first + tl.arange(0, TILE)
    end = head + V
    inside = (cols >= head) & (cols < end)
    whole = (first >= head) & (first + TILE <= end)
    if (y == ignore_index) | (g == 0.0) | (y < 0) | (y >= V):
        legal = (y == ignore_index) | (g == 0.0)
        value = tl.where(legal, 0.0, float("nan"))
        fill = tl.full([TILE], 0.0, tl.float32) + value
        if whole:
            tl.store(row_out + cols, fill.to(out.dtype.element_ty))
        else:
            tl.store(row_out + cols, fill.to(out.dtype.element_ty), mask=inside)
    else:
        unit = tl.zeros([], tl.float64) + unit_hi + unit_lo
        row_lse = tl.load(lse + index)
        exact = tl.where(unit == 0.0, 0.0, row_lse / tl.where(unit == 0.0, 1.0, unit))
        hi = exact.to(tl.float32)
        rounding = tl.exp2((hi.to(tl.float64) - exact).to(tl.float32) * k)
        if unit == 0.0:
            rounding = tl.exp(-row_lse).to(tl.float32)
        target = y + head
        if whole:
            x = tl.load(row + cols).to(tl.float32)
            if (target >= first) & (target < first + TILE):
                d = _gradient(x, cols, target, g, hi, row_lse, inner, outer, k, chain, unit,
                              rounding, SOFTCAP, True)  # fmt: skip
            else:
                d = _gradient(x, cols, target, g, hi, row_lse, inner, outer, k, chain, unit,
                              rounding, SOFTCAP, False)  # fmt: skip
            tl.store(row_out + cols, d.to(out.dtype.element_ty))
        else:
            x = tl.load(row + cols, mask=inside, other=0.0).to(tl.float32)
            d = _gradient(x, cols, target, g, hi, row_lse, inner, outer, k, chain, unit,
                          rounding, SOFTCAP, True)  # fmt: skip
            tl.store(row_out + cols, d.to(out.dtype.element_ty), mask=inside)


def _scalars(t: LogitTransform) -> dict[str, float]:
    """inner, outer, k, unit (fp64 in two fp32 halves) and the slope dz/dx of `_value`."""
    if t.softcap:
        inner, outer, unit = t.scale / t.softcap, t.softcap, t.inv_temperature
    else:
        factor = t.scale * t.inv_temperature
        inner, outer, unit = 0.0, -1.0 if factor < 0 else 1.0, abs(factor)
    hi = _fp32(unit)
    return {"inner": inner, "outer": outer, "k": unit * math.log2(math.e), "unit_hi": hi,
            "unit_lo": unit - hi}  # fmt: skip


def _fp32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def token_logps(
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backends.torch.token_logps`."""
    R, T, V = logits.shape
    targets = targets.contiguous()
    logps = logits.new_empty((R, T), dtype=torch.float32)
    lse = logits.new_empty((R, T), dtype=torch.float64)
    table = logits.new_empty((4 if stats else 0, R, T), dtype=torch.float32)
    if R * T:
        base, place = placed(logits)
        with on(logits):
            _forward[(R * T,)](
                base, targets, logps, lse, table, *place,
                T, V, R * T, ignore_index, **_scalars(transform), SOFTCAP=transform.softcap != 0,
                STATS=bool(stats), **(FORWARD_STATS if stats else FORWARD),
            )  # fmt: skip
    order = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    if stats and tuple(stats) != order:
        table = torch.stack([table[order.index(stat)] for stat in stats])
    return logps, lse, table


def token_logps_backward(
    grad: Tensor,  # [R, T]
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    lse: Tensor,  # [R, T] fp64
    ignore_index: int,
    transform: LogitTransform,
    out: Tensor,  # [R, T, V], may be `logits`
) -> None:
    """As `backends.torch.token_logps_backward`."""
    R, T, V = logits.shape
    if logits.numel() == 0:
        return
    chain = transform.scale * transform.inv_temperature
    (base, place), (out_base, out_place) = placed(logits), placed(out)
    # The first tile begins up to _ALIGN - 1 elements before the row.
    tiles = triton.cdiv(V + _ALIGN.value - 1, BACKWARD["TILE"])
    with on(logits):
        _backward[(R * T, tiles)](
            grad.float().contiguous(), base, targets.contiguous(), lse.contiguous(), out_base,
            *place, *out_place, T, V, ignore_index,
            **_scalars(transform), chain=chain, SOFTCAP=transform.softcap != 0,
            SAME_PHASE=same_phase(place, out_place), **BACKWARD,
        )  # fmt: skip
