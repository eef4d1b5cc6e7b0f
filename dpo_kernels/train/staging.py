"""Copies on the host of a run's tensors, for a thread to write while steps change the originals.

The memory of the copies stays from save to save: fresh pages cost several times the copy itself.
What is pinned for tensors of a GPU has not run on one yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Staging:
    """Copies by name; `take` writes over those of the call before."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor as it is now. Nobody may still read what the call before gave."""
        before, self._copies = self._copies, {}
        for name, x in tensors.items():
            self._copies[name] = _copied(x.detach(), before.pop(name, None))
        if any(x.is_cuda for x in tensors.values()):
            torch.cuda.synchronize()
        return dict(self._copies)

    def drop(self) -> None:
        """Give the memory back."""
        self._copies = {}


def _copied(x: Tensor, room: Tensor | None) -> Tensor:
    """A copy that the next step does not change, in `room` if it fits.

    Of a GPU's tensor it may not be there yet.
    """
    if room is None or not _fits(room, x):
        return _new(x)
    if _is_sharded(x):
        _own(room).copy_(_own(x), non_blocking=True)
    else:
        room.copy_(x, non_blocking=True)
    return room


def _new(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone()
    if _is_sharded(x):
        return x.to("cpu")
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _fits(room: Any, x: Any) -> bool:
    """Whether `room` was made for tensors like `x`; other subclasses know more than a shape."""
    if room.shape != x.shape or room.dtype != x.dtype:
        return False
    if _is_sharded(x):
        layout = ("device_mesh", "placements")
        same = _is_sharded(room) and all(getattr(room, k) == getattr(x, k) for k in layout)
        return same and _own(room).shape == _own(x).shape
    return type(room) is type(x) is Tensor and room.layout == x.layout == torch.strided


def _is_sharded(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")


def _own(x: Any) -> Tensor:
    """This rank's part of a tensor in shards, no copy of it."""
    part: Tensor = x.to_local()
    return part
