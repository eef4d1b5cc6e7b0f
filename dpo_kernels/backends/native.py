"""Tensors as the parameter structs of the compiled module: what the C++ and CUDA backends share."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..inputs.transform import LogitTransform
from .terms import OrdinaryPairs

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _strided(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def numbers(t: LogitTransform) -> list[float]:
    return [t.scale, t.softcap, t.inv_temperature]


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def token_logps(
    module: ModuleType,
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T] contiguous
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
    *,
    keep_logps: bool = True,
) -> tuple[Any, tuple[Any, Tensor, Tensor | None]]:
    """Parameters of the forward, and its empty results: logps (None if they are not kept), lse,
    statistics (None without)."""
    R, T, V = logits.shape
    logps = targets.new_empty((R, T), dtype=torch.float32) if keep_logps else None
    lse = targets.new_empty((R, T), dtype=torch.float64)
    table, columns = None, {}
    if stats:
        table = targets.new_empty((len(stats), R, T), dtype=torch.float32)
        columns = {stat: table[i].data_ptr() for i, stat in enumerate(stats)}
    params = module.TokenLogps(
        *_strided(logits),
        targets.data_ptr(),
        R,
        T,
        V,
        ignore_index,
        DTYPES[logits.dtype],
        numbers(transform),
        pointer(logps),
        lse.data_ptr(),
        columns.get("entropy", 0),
        columns.get("mean_logits", 0),
        columns.get("is_top1", 0),
        columns.get("log_sum_sq_probs", 0),
    )
    return params, (logps, lse, table)


def token_logps_backward(
    module: ModuleType,
    grad: Tensor | None,  # [R, T] fp32 contiguous
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T] contiguous
    lse: Tensor,  # [R, T] fp64 contiguous
    ignore_index: int,
    transform: LogitTransform,
    out: Tensor,  # [R, T, V], may be `logits`
) -> Any:
    """Parameters of the backward."""
    R, T, V = logits.shape
    return module.TokenLogpsBackward(
        pointer(grad),
        *_strided(logits),
        targets.data_ptr(),
        lse.data_ptr(),
        R,
        T,
        V,
        ignore_index,
        DTYPES[logits.dtype],
        numbers(transform),
        *_strided(out),
        DTYPES[out.dtype],
    )


def token_kl(
    module: ModuleType,
    logits: Tensor,  # [R, T, V]
    ref_logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T] contiguous
    ignore_index: int,
    transform: LogitTransform,
) -> tuple[Any, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Parameters of the joint forward, and its empty results as `backends.torch.token_kl` has."""
    R, T, V = logits.shape
    kinds = (torch.float32, torch.float64, torch.float32, torch.float64, torch.float32)
    logps, lse, ref_logps, ref_lse, kl = (targets.new_empty((R, T), dtype=kind) for kind in kinds)
    results = (logps, lse, ref_logps, ref_lse, kl)
    params = module.TokenKl(
        *_strided(logits),
        *_strided(ref_logits),
        targets.data_ptr(),
        R,
        T,
        V,
        ignore_index,
        DTYPES[logits.dtype],
        DTYPES[ref_logits.dtype],
        numbers(transform),
        *(x.data_ptr() for x in results),
    )
    return params, results


def token_kl_backward(
    module: ModuleType,
    grad_logps: Tensor,  # [R, T] fp32 contiguous
    grad_kl: Tensor,  # [R, T] fp32 contiguous
    logits: Tensor,  # [R, T, V]
    ref_logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T] contiguous
    lse: Tensor,  # [R, T] fp64 contiguous
    ref_lse: Tensor,  # [R, T] fp64 contiguous
    ignore_index: int,
    transform: LogitTransform,
    out: Tensor,  # [R, T, V]
) -> Any:
    """Parameters of the joint backward."""
    R, T, V = logits.shape
    return module.TokenKlBackward(
        grad_logps.data_ptr(),
        grad_kl.data_ptr(),
        *_strided(logits),
        *_strided(ref_logits),
        targets.data_ptr(),
        lse.data_ptr(),
        ref_lse.data_ptr(),
        R,
        T,
        V,
        ignore_index,
        DTYPES[logits.dtype],
        DTYPES[ref_logits.dtype],
        numbers(transform),
        *_strided(out),
    )


def sequence_sum(
    module: ModuleType,
    values: Tensor,  # [R, T] fp32 contiguous
    targets: Tensor,  # [R, T] contiguous
    starts: Tensor | None,  # [S + 1]
    S: int,
    ignore_index: int,
    tail_weight: float,
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Parameters of the sums, and their empty results: sums, counts."""
    sums = targets.new_empty(S, dtype=torch.float64)
    counts = targets.new_empty(S, dtype=torch.int64)
    params = module.SequenceSum(
        targets.data_ptr(),
        pointer(starts),
        S,
        ignore_index,
        tail_weight,
        values.data_ptr(),
        sums.data_ptr(),
        counts.data_ptr(),
        0,
        0,
    )
    return params, (sums, counts)


def sequence_sum_backward(
    module: ModuleType,
    grad: Tensor,  # [S] fp64 contiguous
    targets: Tensor,  # [R, T] contiguous
    starts: Tensor | None,  # [S + 1]
    S: int,
    ignore_index: int,
    tail_weight: float,
) -> tuple[Any, Tensor]:
    """Parameters of the sums' backward, and d_values [R, T], zero where nothing will be written."""
    # Boundaries may leave rows out.
    new = targets.new_empty if starts is None else targets.new_zeros
    d_values = new(targets.shape, dtype=torch.float32)
    params = module.SequenceSum(
        targets.data_ptr(),
        pointer(starts),
        S,
        ignore_index,
        tail_weight,
        0,
        0,
        0,
        grad.data_ptr(),
        d_values.data_ptr(),
    )
    return params, d_values


@functools.lru_cache(maxsize=256)
def ordinary_loss(module: ModuleType, terms: tuple[Any, ...]) -> Any:
    """`OrdinaryPairs.terms` as the module has them."""
    return module.OrdinaryLoss(*terms)


def ordinary_given(p: OrdinaryPairs, B: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What else the module takes of an ordinary loss, and the tensors that this points into."""
    reference = None if p.reference is None else p.reference.double().contiguous()
    betas, beta = None, p.beta
    if isinstance(beta, Tensor):
        betas, beta = beta.expand(B).contiguous(), 0.0
    pointers = (pointer(reference), pointer(betas), beta, pointer(p.offset))
    return pointers, (reference, betas)
