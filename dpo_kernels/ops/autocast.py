"""Autocast by device: what it casts to, and without it. A device may have none (meta)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on this device, None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off: what is computed has the dtype of its operands."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not (
        torch.compiler.is_compiling() or torch.is_autocast_enabled(kind)
    ):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
