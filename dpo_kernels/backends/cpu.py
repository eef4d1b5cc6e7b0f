"""C++ kernels on CPU tensors: AVX-512, AVX2 or portable, chosen at run time; OpenMP."""

from __future__ import annotations

import functools

import torch  # before _C: both then share torch's OpenMP pool
from torch import Tensor

from .. import _C
from ..inputs.transform import LogitTransform
from . import native
from .terms import OrdinaryPairs

name = "cpu"
ROUNDS = True  # whether a backward may write a gradient narrower than its logits


def token_logps(
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `backends.torch.token_logps`, None without statistics."""
    targets = targets.contiguous()
    params, results = native.token_logps(_C, logits, targets, ignore_index, transform, stats)
    _C.token_logps(params)
    return results


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
    grad, targets, lse = grad.float().contiguous(), targets.contiguous(), lse.contiguous()
    _C.token_logps_backward(
        native.token_logps_backward(_C, grad, logits, targets, lse, ignore_index, transform, out)
    )


def has_bf16_products() -> bool:
    """Whether this processor multiplies pairs of bf16 and sums in fp32 (AVX512-BF16)."""
    return _C.has_bf16_products()


def bf16_product(
    a: Tensor,  # [M, K] bf16
    b: Tensor,  # [K, N] bf16
    out: Tensor,  # [M, N] fp32, rows may lie apart
    *,
    add: bool,
) -> Tensor:
    """out = a @ b, or out += a @ b, summed in fp32 in one order whatever M and N."""
    (M, K), N = a.shape, b.shape[1]
    assert out.dtype == torch.float32 and (out.stride(1) == 1 or N < 2)
    a, b = (
        x if 1 in x.stride() else x.clone(memory_format=torch.contiguous_format) for x in (a, b)
    )
    (a_row, a_column), (b_row, b_column) = a.stride(), b.stride()
    _C.bf16_product(
        a.data_ptr(),
        a_row,
        a_column,
        b.data_ptr(),
        b_row,
        b_column,
        out.data_ptr(),
        out.stride(0),
        M,
        N,
        K,
        add,
    )
    return out


def token_kl(
    logits: Tensor,  # [R, T, V]
    ref_logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    ignore_index: int,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `backends.torch.token_kl`."""
    targets = targets.contiguous()
    params, results = native.token_kl(_C, logits, ref_logits, targets, ignore_index, transform)
    _C.token_kl(params)
    return results


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
    """As `backends.torch.token_kl_backward`.

    The kernel writes the dtype of the logits: a narrower `out` takes it from `ref_logits`, which
    the head reads no more by then.
    """
    written = out if out.dtype == logits.dtype else ref_logits
    assert written.dtype == logits.dtype
    grad_logps, grad_kl = grad_logps.float().contiguous(), grad_kl.float().contiguous()
    targets, lse, ref_lse = targets.contiguous(), lse.contiguous(), ref_lse.contiguous()
    params = native.token_kl_backward(
        _C,
        grad_logps,
        grad_kl,
        logits,
        ref_logits,
        targets,
        lse,
        ref_lse,
        ignore_index,
        transform,
        written,
    )
    _C.token_kl_backward(params)
    if written is not out:
        out.copy_(written)


@functools.lru_cache(maxsize=64)
def _rows(R: int, T: int) -> Tensor:
    return torch.arange(R + 1, dtype=torch.int64, device="cpu") * T


def _starts(targets: Tensor, cu_seqlens: Tensor | None, trusted: bool = False) -> Tensor:
    """First flat position of each sequence [S + 1]; where they are not `trusted`, cut."""
    R, T = targets.shape
    if cu_seqlens is None:
        return _rows(R, T)
    starts = cu_seqlens.to(torch.int64)
    return (starts if trusted else starts.clamp(0, T)).contiguous()


def targets_of(
    labels: Tensor,  # [S, T] contiguous
    V: int,
    ignore_index: int,
    shift: bool,
) -> tuple[Tensor, tuple[int, ...]] | None:
    """Targets [S, T] and how many of each sequence are scored; None where a label is none of V."""
    (S, T), targets = labels.shape, torch.empty_like(labels) if shift else labels
    given = (labels.data_ptr(), S, T, V, ignore_index, shift)
    lengths = _C.targets_of(*given, targets.data_ptr())
    return None if lengths is None else (targets, lengths)


def packed(
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    count: int,
    whole: int,
    hidden: Tensor | None = None,  # [R, T, H] contiguous
) -> tuple[Tensor, Tensor | None]:
    """Of the `count` scored rows, in one tensor: their flat places, the first again up to `whole`;
    the boundaries of sequences among them; their targets. And the rows of `hidden` [whole, H]."""
    targets = targets.contiguous()
    starts = _starts(targets, cu_seqlens, trusted=True)
    S = starts.shape[0] - 1
    places, rows = targets.new_empty(whole + S + 1 + count), None
    given = (0, 0, 0)
    if hidden is not None:
        H = hidden.shape[2]
        rows = torch.empty((whole, H), dtype=hidden.dtype, device="cpu")
        given = (hidden.data_ptr(), H * hidden.element_size(), rows.data_ptr())
    place = (targets.data_ptr(), starts.data_ptr(), S, ignore_index)
    _C.packed(*place, count, whole, places.data_ptr(), *given)
    return places, rows


def rows_back(rows: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Rows [n, H] at the places that `packed` gave, in zeros of `shape` [R, T, H]."""
    out, (n, H) = torch.empty(shape, dtype=rows.dtype, device="cpu"), rows.shape
    size = H * rows.element_size()
    _C.rows_back(places.data_ptr(), n, rows.data_ptr(), size, shape[0] * shape[1], out.data_ptr())
    return out


def sequence_sum(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
) -> tuple[Tensor, Tensor]:
    """As `backends.torch.sequence_sum`."""
    values, targets = values.contiguous(), targets.contiguous()
    starts = _starts(targets, cu_seqlens)
    params, results = native.sequence_sum(
        _C, values, targets, starts, starts.numel() - 1, ignore_index, tail_weight
    )
    _C.sequence_sum(params)
    return results


def sequence_sum_backward(
    grad: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
    dtype: torch.dtype,
) -> Tensor:
    """As `backends.torch.sequence_sum_backward`."""
    grad, targets = grad.double().contiguous(), targets.contiguous()
    starts = _starts(targets, cu_seqlens)
    params, d_values = native.sequence_sum_backward(
        _C, grad, targets, starts, starts.numel() - 1, ignore_index, tail_weight
    )
    _C.sequence_sum_backward(params)
    return d_values.to(dtype)


def pair_loss_forward(
    u: Tensor,
    v: Tensor,
    beta: Tensor,
    offset: Tensor | None,
    phis: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """As `backends.torch.pair_loss_forward`; all tensors fp64 and contiguous."""
    B = u.numel()
    loss, slopes = torch.empty_like(u), u.new_empty((4, B))
    _C.pair_loss(
        u.data_ptr(),
        v.data_ptr(),
        beta.data_ptr(),
        native.pointer(offset),
        phis,
        numbers,
        B,
        loss.data_ptr(),
        slopes.data_ptr(),
    )
    return loss, slopes


def ordinary(sums: Tensor, counts: Tensor | None, pairs: OrdinaryPairs) -> Tensor:
    """The table of `loss/ordinary.py`, of sums [2B] fp64 and token counts where they are needed."""
    B = sums.shape[0] // 2
    found, sums = sums.new_empty((9, B)), sums.contiguous()
    counts = None if counts is None else counts.double()
    given, _kept = native.ordinary_given(pairs, B)
    _C.ordinary(
        native.ordinary_loss(_C, pairs.terms),
        sums.data_ptr(),
        native.pointer(counts),
        *given,
        B,
        found.data_ptr(),
    )
    return found


def ordinary_rows(
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
    transform: LogitTransform,
    stats: tuple[str, ...],
    pairs: OrdinaryPairs,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`token_logps`, `sequence_sum` and `ordinary`: log-sum-exp, statistics, what is found."""
    targets = targets.contiguous()
    starts = _starts(targets, cu_seqlens, trusted=True)
    params, (_, lse, table) = native.token_logps(
        _C, logits, targets, ignore_index, transform, stats, keep_logps=False
    )
    B = (starts.shape[0] - 1) // 2
    found = lse.new_empty((9, B))
    given, _kept = native.ordinary_given(pairs, B)
    _C.ordinary_rows(
        native.ordinary_loss(_C, pairs.terms),
        params,
        starts.data_ptr(),
        tail_weight,
        *given,
        B,
        found.data_ptr(),
    )
    return lse, table, found


def ordinary_rows_backward(
    found: Tensor,  # [9, B]
    scale: float,
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
    lse: Tensor,  # [R, T] fp64
    transform: LogitTransform,
    out: Tensor,  # [R, T, V], may be `logits`
) -> None:
    """`scale` times the slopes, by `sequence_sum_backward`, by `token_logps_backward`."""
    targets = targets.contiguous()
    starts = _starts(targets, cu_seqlens, trusted=True)
    params = native.token_logps_backward(
        _C, None, logits, targets, lse, ignore_index, transform, out
    )
    _C.ordinary_rows_backward(
        found.data_ptr(), scale, params, starts.data_ptr(), tail_weight, found.shape[1]
    )


def ordinary_streamed(
    logits: Tensor,  # [N, V] fp32
    places: Tensor,  # as `packed` gives them
    ignore_index: int,
    tail_weight: float,
    transform: LogitTransform,
    pairs: OrdinaryPairs,
    B: int,
    divisor: float,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`ordinary_rows`, `ordinary_fields`, and `ordinary_rows_backward` over the logits."""
    N, V = logits.shape
    loss, fields = logits.new_empty((), dtype=dtype), logits.new_empty((6, B), dtype=dtype)
    given, _kept = native.ordinary_given(pairs, B)
    boundaries = places.data_ptr() + 8 * (places.shape[0] - N - 2 * B - 1)
    rows = (logits.data_ptr(), logits.stride(0), N, V, boundaries, ignore_index, tail_weight)
    rest = (B, divisor, dtype == torch.float64, loss.data_ptr(), fields.data_ptr())
    _C.ordinary_streamed(
        native.ordinary_loss(_C, pairs.terms), *rows, native.numbers(transform), *given, *rest
    )
    return loss, fields.unbind(0)


def ordinary_fields(
    found: Tensor, divisor: float, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, a sum over `divisor`, and the six fields of `DPOOutput` after it, in `dtype`."""
    B, wide = found.shape[1], dtype == torch.float64
    loss, fields = found.new_empty((), dtype=dtype), found.new_empty((6, B), dtype=dtype)
    _C.ordinary_fields(found.data_ptr(), B, divisor, wide, loss.data_ptr(), fields.data_ptr())
    return loss, fields.unbind(0)


def instruction_sets() -> list[str]:
    """The instruction sets this processor runs, the one in use by default first."""
    return _C.instruction_sets().split(",")
