"""Log-prob and log-sum-exp of each scored row, and the gradient of the logits, in Triton.

Forward: one program a row, one read. A tile is [K, LANES] with one 16-byte vector a thread and K:
each lane keeps its own running maximum and sum and reduces over K in registers, without a barrier;
the lanes meet once, after the loop. Backward: one program a tile of a row, one read and one write.

A row may start anywhere (odd V, views), so tiles are counted from the 16-byte boundary at or before
its start and hold whole vectors only: a mask is constant over a vector, and every load is one. The
few columns before the first and after the last whole vector, the edge, are taken apart.
Values are subtracted from the maximum before they are scaled (fp32 keeps every digit near it), and
the log-sum-exp is fp64. `zz` is what is summed: softcap's output, or the logit itself with the sign
of the scale, so that z = zz * unit with unit >= 0. Letters as `ops/token_logps.py`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...inputs.transform import LogitTransform
from .launch import ALIGN, VARYING, aligned, lanes, on, vector

# Launch configurations, one place; LANES is what `num_warps` warps load at once. Chosen on an H100,
# bf16, V 32000 to 151936; what they reach: docs/benchmarks.md.
FORWARD = {"K": 4, "STAGES": 3, "num_warps": 4}
FORWARD_STATS = {"K": 2, "STAGES": 3, "num_warps": 4}
BACKWARD = {"TILE": 1024, "num_warps": 2}
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
def _whole_vectors(head, end, VEC: tl.constexpr):
    """The columns [lo, hi) of a row [head, end) that lie in whole vectors of it."""
    lo = (head + VEC - 1) // VEC * VEC
    return lo, tl.maximum(end // VEC * VEC, lo)


@triton.jit
def _in_vectors(cols, lo, hi, VEC: tl.constexpr):
    """Which columns are in [lo, hi), both multiples of VEC; constant over a vector."""
    vector = cols // VEC
    return (vector >= lo // VEC) & (vector < hi // VEC)


@triton.jit
def _edge(head, end, lo, hi, VEC: tl.constexpr):
    """The columns [2 VEC] before and after the whole vectors, and which of them the row has."""
    i = tl.arange(0, 2 * VEC)
    cols = tl.where(i < VEC, lo - VEC + i, hi - VEC + i)
    inside = ((i < VEC) & (cols >= head)) | ((i >= VEC) & (cols >= hi))
    return cols, inside & (cols < end)


@triton.jit
def _add_tile(
    m,
    l,
    weighted,
    squares,
    total,  # [LANES] running maximum, sums, statistics
    row,
    cols,
    lo,
    hi,
    inner,
    outer,
    k,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    VEC: tl.constexpr,
):
    if MASKED:
        inside = _in_vectors(cols, lo, hi, VEC)
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
        # -inf times a weight of 0 would be NaN; a NaN still goes through `e`.
        weighted = shrink * (weighted + l * drop) + tl.sum(e * tl.maximum(d, -1e30), 0)
        squares = shrink * shrink * squares + tl.sum(e * e, 0)
        if MASKED:
            total += tl.sum(tl.where(inside, zz, 0.0), 0)
        else:
            total += tl.sum(zz, 0)
    l = l * shrink + tl.sum(e, 0)
    return top, l, weighted, squares, total


@triton.jit(do_not_specialize=VARYING)
def _forward(
    logits,  # [R, T, V] at `shift`, strides (stride_r, stride_t, 1)
    targets,  # [R, T]
    logps,
    lse,
    stats,  # [R, T] fp32, [R, T] fp64, [4, R, T] fp32: entropy, mean, top1, squares
    shift,
    stride_r,
    stride_t,
    T,
    V,
    rows,
    ignore_index,
    inner,
    outer,
    k,
    unit_hi,
    unit_lo,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
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
        start = shift + (index // T) * stride_r + (index % T) * stride_t
        zy = _value(tl.load(logits + start + y).to(tl.float32), inner, outer, SOFTCAP)
        head = (start % _ALIGN).to(tl.int32)
        row = logits + tl.multiple_of(start - head, _ALIGN)
        end = head + V
        target = head + y.to(tl.int32)
        lo, hi = _whole_vectors(head, end, VEC)
        edge, at_edge = _edge(head, end, lo, hi, VEC)
        x = tl.load(row + edge, mask=at_edge, other=0.0).to(tl.float32)
        edge_zz = tl.where(at_edge, _value(x, inner, outer, SOFTCAP), -float("inf"))

        tile: tl.constexpr = K * LANES
        cols = tl.arange(0, K)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        m = tl.full([LANES], -float("inf"), tl.float32)
        l = tl.zeros([LANES], tl.float32)
        weighted = tl.zeros([LANES], tl.float32)
        squares = tl.zeros([LANES], tl.float32)
        total = tl.zeros([LANES], tl.float32)
        before = m  # maxima of the tiles before the target's
        target_tile = target // tile * tile
        # Counted, not chosen: an offset that is one of two constants crashes Triton 3.2's compiler.
        cut = (lo > 0) | (hi < tile)
        begin = cut.to(tl.int32) * tile
        if cut:
            m, l, weighted, squares, total = _add_tile(
                m,
                l,
                weighted,
                squares,
                total,
                row,
                cols,
                lo,
                hi,
                inner,
                outer,
                k,
                SOFTCAP,
                STATS,
                True,
                VEC,
            )
            if STATS:
                before = tl.where(target_tile > 0, m, before)
        inner_end = hi // tile * tile
        for first in tl.range(begin, inner_end, tile, num_stages=STAGES):
            m, l, weighted, squares, total = _add_tile(
                m,
                l,
                weighted,
                squares,
                total,
                row,
                first + cols,
                lo,
                hi,
                inner,
                outer,
                k,
                SOFTCAP,
                STATS,
                False,
                VEC,
            )
            if STATS:
                before = tl.where(first < target_tile, m, before)
        if (hi > tile) & (inner_end < hi):
            m, l, weighted, squares, total = _add_tile(
                m,
                l,
                weighted,
                squares,
                total,
                row,
                inner_end + cols,
                lo,
                hi,
                inner,
                outer,
                k,
                SOFTCAP,
                STATS,
                True,
                VEC,
            )

        top = tl.maximum(tl.max(m, 0), tl.max(edge_zz, 0))
        base = tl.where(top == -float("inf"), 0.0, top)
        drop = tl.where(m == -float("inf"), 0.0, m - base)
        shrink = tl.where(m == -float("inf"), 0.0, tl.exp2(drop * k))
        edge_d = edge_zz - base
        edge_e = tl.where(at_edge, tl.exp2(edge_d * k), 0.0)
        # The terms of the maximum itself, 1 each, are counted apart: beside them the rest of a
        # confident row (1 - p) would be rounded away. A NaN sum stays NaN.
        tied, edge_tied = m == top, (edge_zz == top) & at_edge
        ones = tl.sum(tied.to(tl.float32), 0) + tl.sum(edge_tied.to(tl.float32), 0)
        rest = tl.sum(tl.where(tied, l - 1.0, l * shrink), 0)
        rest += tl.sum(tl.where(edge_tied, 0.0, edge_e), 0)
        rest = tl.where(top == -float("inf"), float("nan"), rest)
        sum_l = ones.to(tl.float64) + rest.to(tl.float64)
        unit = tl.zeros([], tl.float64) + unit_hi + unit_lo
        log_l = tl.log(sum_l)
        logp = (zy.to(tl.float64) - top.to(tl.float64)) * unit - log_l
        tl.store(logps + index, logp.to(tl.float32))
        tl.store(lse + index, top.to(tl.float64) * unit + log_l)
        if STATS:
            nan = tl.where(logp != logp, logp, 0.0)
            sum_w = tl.sum(shrink * (weighted + l * drop), 0)
            sum_w += tl.sum(edge_e * tl.maximum(edge_d, -1e30), 0)
            sum_s = tl.sum(shrink * shrink * squares, 0) + tl.sum(edge_e * edge_e, 0)
            sum_z = tl.sum(total.to(tl.float64), 0)
            sum_z += tl.sum(tl.where(at_edge, edge_zz, 0.0).to(tl.float64), 0)
            # The target is first among the largest: no tie before it. Only its own tile, read once
            # more, has columns on both sides of it.
            top1 = (zy == top).to(tl.float64)
            if zy == top:
                ties = tl.max((edge_tied & (edge < target)).to(tl.int32), 0)
                ties = tl.maximum(ties, tl.max((before == top).to(tl.int32), 0))
                near = target_tile + cols
                inside = _in_vectors(near, lo, hi, VEC)
                again = tl.load(row + near, mask=inside, other=0.0).to(tl.float32)
                same = inside & (near < target) & (_value(again, inner, outer, SOFTCAP) == top)
                ties = tl.maximum(ties, tl.max(tl.max(same.to(tl.int32), 1), 0))
                top1 = 1.0 - ties.to(tl.float64)
            if k == 0.0:  # flat: all are the largest
                top1 = (y == 0).to(tl.float64)
            entropy = log_l - sum_w.to(tl.float64) / sum_l * unit
            tl.store(stats + index, (entropy + nan).to(tl.float32))
            tl.store(stats + rows + index, (sum_z * unit / V + nan).to(tl.float32))
            tl.store(stats + 2 * rows + index, (top1 + nan).to(tl.float32))
            log_squares = tl.log(sum_s.to(tl.float64)) - 2 * log_l
            tl.store(stats + 3 * rows + index, (log_squares + nan).to(tl.float32))


@triton.jit
def _origin(row_lse, unit, inverse, k):
    """lse / unit as fp32, 0 of unit 0, and the factor that makes up for its rounding."""
    exact = row_lse * inverse
    hi = exact.to(tl.float32)
    rounding = tl.exp2((hi.to(tl.float64) - exact).to(tl.float32) * k)
    if unit == 0.0:
        rounding = tl.exp(-row_lse).to(tl.float32)
    return hi, rounding


@triton.jit
def _gradient(
    x,
    cols,
    y,
    g,
    hi,
    lse,
    inner,
    outer,
    k,
    chain,
    unit,
    rounding,
    SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
):
    """-g dz/dx p, and at the target g dz/dx (1 - p) without cancellation."""
    slope = chain
    zz = outer * x
    if SOFTCAP:
        t = _tanh(x * inner)
        zz = outer * t
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
    grad,
    logits,
    targets,
    lse,
    out,  # [R, T], [R, T, V], [R, T], [R, T] fp64, [R, T, V]
    shift,
    stride_r,
    stride_t,
    out_shift,
    out_stride_r,
    out_stride_t,
    T,
    V,
    rows,
    tiles,
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
    VEC: tl.constexpr,
):
    # Rows backwards: the last rows the forward read may still lie in L2.
    program = tl.program_id(0)
    index = (rows - 1 - program // tiles).to(tl.int64)
    first = program % tiles * TILE
    y = tl.load(targets + index)
    g = tl.load(grad + index)
    start = shift + (index // T) * stride_r + (index % T) * stride_t
    out_start = out_shift + (index // T) * out_stride_r + (index % T) * out_stride_t
    head = (out_start % _ALIGN).to(tl.int32)
    row_out = out + tl.multiple_of(out_start - head, _ALIGN)
    row = logits + (start - head)
    if SAME_PHASE:  # both rows lie alike within 16 elements: whole vectors in and out
        row = logits + tl.multiple_of(start - head, _ALIGN)
    cols = first + tl.arange(0, TILE)
    end = head + V
    lo, hi = _whole_vectors(head, end, VEC)
    whole = _in_vectors(cols, lo, hi, VEC)
    edge, at_edge = _edge(head, end, lo, hi, VEC)
    ragged = (first == 0) & ((lo > head) | (hi < end))
    if (y == ignore_index) | (g == 0.0) | (y < 0) | (y >= V):
        legal = (y == ignore_index) | (g == 0.0)
        value = tl.where(legal, 0.0, float("nan"))
        fill = tl.full([TILE], 0.0, tl.float32) + value
        tl.store(row_out + cols, fill.to(out.dtype.element_ty), mask=whole)
        if ragged:
            edge_fill = tl.full([2 * VEC], 0.0, tl.float32) + value
            tl.store(row_out + edge, edge_fill.to(out.dtype.element_ty), mask=at_edge)
    else:
        x = tl.load(row + cols, mask=whole, other=0.0).to(tl.float32)
        row_lse = tl.load(lse + index)
        unit = tl.zeros([], tl.float64) + unit_hi + unit_lo
        inverse = tl.zeros([], tl.float64) + inv_hi + inv_lo
        near, rounding = _origin(row_lse, unit, inverse, k)
        target = head + y.to(tl.int32)
        if (target >= first) & (target < first + TILE):
            d = _gradient(
                x,
                cols,
                target,
                g,
                near,
                row_lse,
                inner,
                outer,
                k,
                chain,
                unit,
                rounding,
                SOFTCAP,
                True,
            )
        else:
            d = _gradient(
                x,
                cols,
                target,
                g,
                near,
                row_lse,
                inner,
                outer,
                k,
                chain,
                unit,
                rounding,
                SOFTCAP,
                False,
            )
        tl.store(row_out + cols, d.to(out.dtype.element_ty), mask=whole)
        if ragged:
            edge_x = tl.load(row + edge, mask=at_edge, other=0.0).to(tl.float32)
            edge_d = _gradient(
                edge_x,
                edge,
                target,
                g,
                near,
                row_lse,
                inner,
                outer,
                k,
                chain,
                unit,
                rounding,
                SOFTCAP,
                True,
            )
            tl.store(row_out + edge, edge_d.to(out.dtype.element_ty), mask=at_edge)


def _scalars(t: LogitTransform) -> dict[str, float]:
    """inner, outer, k and unit (fp64 in two fp32 halves)."""
    if t.softcap:
        inner, outer, unit = t.scale / t.softcap, t.softcap, t.inv_temperature
    else:
        factor = t.scale * t.inv_temperature
        inner, outer, unit = 0.0, -1.0 if factor < 0 else 1.0, abs(factor)
    hi, lo = _halves(unit)
    return {
        "inner": inner,
        "outer": outer,
        "k": unit * math.log2(math.e),
        "unit_hi": hi,
        "unit_lo": lo,
    }


def _scalars_backward(t: LogitTransform) -> dict[str, float]:
    """Those, 1 / unit in two halves (0 of 0), and what of dz/dx is the same for every logit."""
    scalars = _scalars(t)
    unit = scalars["unit_hi"] + scalars["unit_lo"]
    inv_hi, inv_lo = _halves(1 / unit if unit else 0.0)
    return {**scalars, "inv_hi": inv_hi, "inv_lo": inv_lo, "chain": t.scale * t.inv_temperature}


def _halves(x: float) -> tuple[float, float]:
    """An fp64 number as two fp32 numbers: a launch's scalars are fp32."""
    # On the CPU whatever the default device: a GPU would be waited for.
    hi = torch.tensor(x, dtype=torch.float32, device="cpu").item()
    return hi, x - hi


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
    config = FORWARD_STATS if stats else FORWARD
    base, shift = aligned(logits)
    if R * T:
        with on(logits):
            _forward[(R * T,)](
                base,
                targets,
                logps,
                lse,
                table,
                shift,
                logits.stride(0),
                logits.stride(1),
                T,
                V,
                R * T,
                ignore_index,
                **_scalars(transform),
                SOFTCAP=transform.softcap != 0,
                STATS=bool(stats),
                VEC=vector(logits),
                **lanes(logits, config),
            )
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
    out: Tensor,  # [R, T, V], may be `logits`; its dtype may be narrower than fp32 logits'
) -> None:
    """As `backends.torch.token_logps_backward`."""
    R, T, V = logits.shape
    if logits.numel() == 0:
        return
    base, shift = aligned(logits)
    base_out, out_shift = aligned(out)
    apart = [a - b for a, b in zip(logits.stride(), out.stride(), strict=True)]
    # The first tile begins up to ALIGN - 1 elements before the row.
    tiles = triton.cdiv(V + ALIGN - 1, BACKWARD["TILE"])
    with on(logits):
        _backward[(R * T * tiles,)](
            grad.float().contiguous(),
            base,
            targets.contiguous(),
            lse.contiguous(),
            base_out,
            shift,
            logits.stride(0),
            logits.stride(1),
            out_shift,
            out.stride(0),
            out.stride(1),
            T,
            V,
            R * T,
            tiles,
            ignore_index,
            **_scalars_backward(transform),
            SOFTCAP=transform.softcap != 0,
            SAME_PHASE=not any(n % ALIGN for n in (shift - out_shift, *apart)),
            VEC=vector(out),
            **BACKWARD,
        )
