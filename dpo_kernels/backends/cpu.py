"""C++ kernels on CPU tensors: AVX-512, AVX2 or portable, chosen at run time; OpenMP."""

from __future__ import annotations

import torch  # before _C: both then share torch's OpenMP pool
from torch import Tensor

from .. import _C
from ..transform import LogitTransform

name = "cpu"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _strides(logits: Tensor) -> tuple[int, int, int]:
    return logits.data_ptr(), logits.stride(0), logits.stride(1)


def _transform(t: LogitTransform) -> list[float]:
    return [t.scale, t.softcap, t.inv_temperature]


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
    logps = torch.empty(targets.shape, dtype=torch.float32)
    lse = torch.empty(targets.shape, dtype=torch.float64)
    table = torch.empty((len(stats), R, T), dtype=torch.float32)
    columns = {stat: table[i].data_ptr() for i, stat in enumerate(stats)}
    _C.token_logps(
        *_strides(logits), targets.data_ptr(), R, T, V, ignore_index, _DTYPES[logits.dtype],
        _transform(transform), logps.data_ptr(), lse.data_ptr(), columns.get("entropy", 0),
        columns.get("mean_logits", 0), columns.get("is_top1", 0),
        columns.get("log_sum_sq_probs", 0),
    )  # fmt: skip
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
    grad, targets, lse = grad.float().contiguous(), targets.contiguous(), lse.contiguous()
    _C.token_logps_backward(
        grad.data_ptr(), *_strides(logits), targets.data_ptr(), lse.data_ptr(), R, T, V,
        ignore_index, _DTYPES[logits.dtype], _transform(transform), *_strides(out),
    )  # fmt: skip


def _starts(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """First flat position of each sequence [S + 1]."""
    R, T = targets.shape
    if cu_seqlens is None:
        return torch.arange(R + 1, dtype=torch.int64) * T
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
    S = starts.numel() - 1
    sums = torch.empty(S, dtype=torch.float64)
    counts = torch.empty(S, dtype=torch.int64)
    _C.sequence_sum(
        targets.data_ptr(), starts.data_ptr(), S, ignore_index, tail_weight, values.data_ptr(),
        sums.data_ptr(), counts.data_ptr(),
    )  # fmt: skip
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
    grad, targets = grad.double().contiguous(), targets.contiguous()
    starts = _starts(targets, cu_seqlens)
    d_values = torch.zeros(targets.shape, dtype=torch.float32)
    _C.sequence_sum_backward(
        targets.data_ptr(), starts.data_ptr(), starts.numel() - 1, ignore_index, tail_weight,
        grad.data_ptr(), d_values.data_ptr(),
    )  # fmt: skip
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
    loss, slopes = torch.empty_like(u), torch.empty((4, B), dtype=torch.float64)
    offset_ptr = 0 if offset is None else offset.data_ptr()
    _C.pair_loss(
        u.data_ptr(), v.data_ptr(), beta.data_ptr(), offset_ptr, phis, numbers, B,
        loss.data_ptr(), slopes.data_ptr(),
    )  # fmt: skip
    return loss, slopes


def instruction_sets() -> list[str]:
    """The instruction sets this processor runs, the one in use by default first."""
    return _C.instruction_sets().split(",")
