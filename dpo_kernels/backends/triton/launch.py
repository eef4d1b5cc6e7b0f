"""What every launch needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager:
    """The tensor's device as the current one: Triton launches on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
