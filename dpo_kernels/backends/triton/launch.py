"""What every launch needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager:
    """The tensor's device as the current one: Triton launches on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


ALIGN = 16  # elements: 32 bytes of bf16, 64 of fp32; rows are counted from such a boundary


def aligned(x: Tensor) -> tuple[Tensor, int]:
    """A tensor that begins on an aligned address of the same storage, and where in it x begins.

    Else one column dropped from the left would turn every load of a kernel into single elements.
    Where the storage itself begins elsewhere (memory from outside torch): x, 0.
    """
    shift = x.data_ptr() // x.element_size() % ALIGN
    if shift == 0 or shift > x.storage_offset():
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - shift), shift


def vector(x: Tensor) -> int:
    """Elements of x in 16 bytes, which a thread loads at once."""
    return 16 // x.element_size()


def lanes(x: Tensor, config: dict[str, int]) -> dict[str, int]:
    """A launch configuration with its LANES: what all threads load at once."""
    return {**config, "LANES": 32 * config["num_warps"] * vector(x)}


# Scalars that a batch, a view or an option changes: Triton must not compile a kernel anew because
# one of them became 1 or a multiple of 16, in mid-training or inside a graph capture.
VARYING = (
    *("T", "V", "N", "S", "B", "rows", "tiles", "ignore_index", "tail_weight"),
    *("shift", "stride_r", "stride_t", "ref_shift", "ref_stride_r", "ref_stride_t"),
    *("out_shift", "out_stride_r", "out_stride_t"),
    *("inner", "outer", "k", "unit_hi", "unit_lo", "inv_hi", "inv_lo", "chain"),
)
