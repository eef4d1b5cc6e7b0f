"""C++ kernels on CPU tensors: AVX-512, AVX2 or portable, chosen at run time; OpenMP."""

from __future__ import annotations

import functools

import torch  # before _C: both then share torch's OpenMP pool
from torch import Tensor

from .. import _C
from ..inputs.transform import LogitTransform
from . import native

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
    _C.bf16_product(
        a.data_ptr(),
        *a.stride(),
        b.data_ptr(),
        *b.stride(),
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
    """As `backends.torch.token_kl_backward`."""
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
        out,
    )
    _C.token_kl_backward(params)


@functools.lru_cache(maxsize=64)
def _rows(R: int, T: int) -> Tensor:
    return torch.arange(R + 1, dtype=torch.int64, device="cpu") * T


def _starts(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """First flat position of each sequence [S + 1]."""
    R, T = targets.shape
    if cu_seqlens is None:
        return _rows(R, T)
    return cu_seqlens.to(torch.int64).clamp(0, T).contiguous()


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


def instruction_sets() -> list[str]:
    """The instruction sets this processor runs, the one in use by default first."""
    return _C.instruction_sets().split(",")
