"""What every launch needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager:
    """The tensor's device as the current one: Triton launches on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# Scalars that a batch, a view or an option changes: Triton must not compile a kernel anew because
# one of them became 1 or a multiple of 16, in mid-training or inside a graph capture.
VARYING = (
    *("T", "V", "N", "S", "B", "rows", "ignore_index", "tail_weight"),
    *("skip", "ref_skip", "out_skip"),
    *("stride_r", "stride_t", "ref_stride_r", "ref_stride_t", "out_stride_r", "out_stride_t"),
    *("inner", "outer", "k", "unit_hi", "unit_lo", "chain"),
)

ALIGN = 16  # elements: 32 bytes of bf16, 64 of fp32
Place = tuple[int, int, int]  # where rows [R, T] lie in memory: elements skipped, two strides


def placed(x: Tensor) -> tuple[Tensor, Place]:
    """Memory that holds the rows of `x` from a boundary of `ALIGN` elements on, and where there.

    Of a pointer that is not aligned to 16 bytes Triton would compile the kernel again, with loads
    of single elements that spill registers. Memory that begins with `x` itself stays as it is.
    """
    skip = x.data_ptr() // x.element_size() % ALIGN
    if skip > x.storage_offset():
        skip = 0
    base = x.as_strided(x.shape, x.stride(), x.storage_offset() - skip) if skip else x
    return base, (skip, x.stride(0), x.stride(1))


def same_phase(first: Place, *others: Place) -> bool:
    """Whether rows lie alike against `ALIGN` elements, wherever they start."""
    return all((a - b) % ALIGN == 0 for x in others for a, b in zip(first, x, strict=True))
