"""From the host to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`; to a GPU from pinned memory, or the host would wait until it is idle."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        x = x.pin_memory()
    # Never towards the host: what is read there must have arrived.
    return x.to(device, non_blocking=x.device.type == "cpu")
