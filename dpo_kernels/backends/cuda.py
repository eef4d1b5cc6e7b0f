"""CUDA C++ kernels on NVIDIA GPUs, enqueued on the tensor's current stream.

Each function here allocates, fills a parameter struct and launches once; nothing waits for the
device, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import _C
from ..inputs.transform import LogitTransform
from . import native
from .terms import OrdinaryPairs

name = "cuda"
ROUNDS = True  # whether a backward may write a gradient narrower than its logits
# Plays the GPU on CPU tensors, for the tests: the same kernels compiled for the host.
on_host: ModuleType | None = None
_counters: dict[tuple[int, int], Tensor] = {}


def architectures() -> list[str]:
    """The GPU architectures this build holds code for, e.g. "90"; empty if built without CUDA."""
    return [a for a in _C.cuda_architectures.split(",") if a]


def code_for(major: int, minor: int) -> str:
    """What of this build a GPU of compute capability `major.minor` runs; empty if nothing."""
    built = architectures()
    # Machine code runs on later minor versions of its major one; PTX of the newest on what follows.
    for a in reversed(built):
        if int(a) // 10 == major and int(a) % 10 <= minor:
            return f"machine code of sm_{a}"
    if built and 10 * major + minor >= int(built[-1]):
        return f"PTX of sm_{built[-1]}, which the driver compiles at first use"
    return ""


def _module(x: Tensor) -> ModuleType:
    if x.is_cuda:
        return _C
    if on_host is None:
        raise RuntimeError(f"backend 'cuda' does not take tensors on {x.device}")
    return on_host


def _where(x: Tensor) -> tuple[int, int]:
    """Device index and stream handle of a launch for `x`."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _zeroed(x: Tensor, size: int) -> Tensor:
    """`size` bytes that every launch finds and leaves zero: kept for the stream's next launch.

    A captured graph may be replayed beside that stream's later work: it gets bytes of its own.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.uint8, device=x.device)
    where = _where(x)
    kept = _counters.get(where)
    if kept is None or kept.numel() < size or kept.device != x.device:
        kept = torch.zeros(max(size, 1 << 16), dtype=torch.uint8, device=x.device)
        _counters[where] = kept
    return kept


def token_logps(
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `backends.torch.token_logps`, None without statistics."""
    module, targets = _module(logits), targets.contiguous()
    params, results = native.token_logps(module, logits, targets, ignore_index, transform, stats)
    R, T, V = logits.shape
    device, stream = _where(logits)
    splits = module.cuda_splits(R * T, V, native.DTYPES[logits.dtype], device)
    counters = _zeroed(logits, module.cuda_counters(R * T))
    size = module.cuda_scratch(R * T, splits)
    scratch = torch.empty(size, dtype=torch.uint8, device=logits.device)
    module.cuda_token_logps(params, splits, counters.data_ptr(), scratch.data_ptr(), device, stream)
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
    module = _module(logits)
    grad, targets, lse = grad.float().contiguous(), targets.contiguous(), lse.contiguous()
    params = native.token_logps_backward(
        module, grad, logits, targets, lse, ignore_index, transform, out
    )
    module.cuda_token_logps_backward(params, *_where(logits))


def _starts(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def sequence_sum(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
) -> tuple[Tensor, Tensor]:
    """As `backends.torch.sequence_sum`."""
    module, values, targets = _module(values), values.contiguous(), targets.contiguous()
    starts = _starts(cu_seqlens)
    S = targets.shape[0] if starts is None else starts.numel() - 1
    params, results = native.sequence_sum(
        module, values, targets, starts, S, ignore_index, tail_weight
    )
    module.cuda_sequence_sum(params, targets.numel(), *_where(values))
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
    grad = grad.double().contiguous()
    return _sums_backward(grad, 1.0, targets, cu_seqlens, ignore_index, tail_weight).to(dtype)


def _sums_backward(
    grad: Tensor,  # [S] fp64 contiguous
    scale: float | Tensor,  # of all, or a tensor [] or [S / 2] fp64
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
) -> Tensor:
    module, targets, starts = _module(grad), targets.contiguous(), _starts(cu_seqlens)
    S = targets.shape[0] if starts is None else starts.numel() - 1
    params, d_values = native.sequence_sum_backward(
        module, grad, targets, starts, S, ignore_index, tail_weight
    )
    if isinstance(scale, Tensor):
        scale = scale.contiguous()
        by = (1.0, scale.data_ptr(), scale.dim())
    else:
        by = (scale, 0, 0)
    module.cuda_sequence_sum_backward(params, targets.numel(), *by, *_where(grad))
    return d_values


def pair_loss_forward(
    u: Tensor,
    v: Tensor,
    beta: Tensor,
    offset: Tensor | None,
    phis: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """As `backends.torch.pair_loss_forward`; all tensors fp64 and contiguous, at most 3 terms."""
    B = u.numel()
    loss, slopes = torch.empty_like(u), u.new_empty((4, B))
    _module(u).cuda_pair_loss(
        u.data_ptr(),
        v.data_ptr(),
        beta.data_ptr(),
        native.pointer(offset),
        phis,
        numbers,
        B,
        loss.data_ptr(),
        slopes.data_ptr(),
        *_where(u),
    )
    return loss, slopes


def ordinary(sums: Tensor, counts: Tensor | None, pairs: OrdinaryPairs) -> Tensor:
    """As `backends.cpu.ordinary`."""
    module, B = _module(sums), sums.shape[0] // 2
    found, sums = sums.new_empty((9, B)), sums.contiguous()
    counts = None if counts is None else counts.double()
    given, _kept = native.ordinary_given(pairs, B)
    module.cuda_ordinary(
        native.ordinary_loss(module, pairs.terms),
        sums.data_ptr(),
        native.pointer(counts),
        *given,
        B,
        found.data_ptr(),
        *_where(sums),
    )
    return found


def ordinary_fields(
    found: Tensor, divisor: float, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `backends.cpu.ordinary_fields`."""
    B, wide = found.shape[1], dtype == torch.float64
    loss, fields = found.new_empty((), dtype=dtype), found.new_empty((6, B), dtype=dtype)
    _module(found).cuda_ordinary_fields(
        found.data_ptr(), B, divisor, wide, loss.data_ptr(), fields.data_ptr(), *_where(found)
    )
    return loss, fields.unbind(0)


def ordinary_sums_backward(
    found: Tensor,  # [9, B]
    scale: float | Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
) -> Tensor:
    """d loss / d log-probs [R, T] fp32: `scale` times the slopes, by `sequence_sum_backward`."""
    return _sums_backward(found[7:], scale, targets, cu_seqlens, ignore_index, tail_weight)
