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
    *("stride_r", "stride_t", "ref_stride_r", "ref_stride_t", "out_stride_r", "out_stride_t"),
    *("inner", "outer", "k", "unit_hi", "unit_lo", "chain"),
)
