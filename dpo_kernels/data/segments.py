"""Who attends to whom in a packed row: segments.

A packed row `[1, T]` is cut into segments, one behind the other. The queries of a segment attend,
causally, to its own tokens and, where it has a parent, to the first tokens of that earlier segment:

    prompt + chosen      no parent
    rejected             parent: the segment before it, of which it sees the prompt

So K completions of one prompt are one segment with the prompt and K - 1 with a parent. The keys of
a segment are the parent's first tokens, then its own: causal attention aligned at the end.

Letters: `S` segments, `T` tokens of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs.transfer import to_device


class Segment(NamedTuple):
    """`length` tokens of its own, and the first `prefix` tokens of the segment `parent`."""

    length: int
    parent: int = -1
    prefix: int = 0


class Boundaries(NamedTuple):
    """What variable-length attention reads, on one device."""

    cu_q: Tensor  # [S + 1] int32
    cu_k: Tensor  # [S + 1] int32
    keys: Tensor | None  # [keys] int64, places in the row; None: every place once, in order
    max_q: int
    max_k: int


class Segments:
    """The segments of one packed row. Not a dataclass and without `to`: what walks through the
    arguments of a forward to move or cast tensors (FSDP, accelerate) leaves it alone."""

    def __init__(self, parts: Sequence[Segment]) -> None:
        for i, part in enumerate(parts):
            alone = part.parent < 0 and not part.prefix
            if not alone and not (
                0 <= part.parent < i
                and not parts[part.parent].prefix
                and 0 < part.prefix <= parts[part.parent].length
            ):
                raise ValueError(f"segment {i} must see the start of an earlier one, got {part}")
        self.parts = list(parts)
        self.table = torch.tensor(self.parts, dtype=torch.int64).reshape(-1, 3)  # [S, 3], host
        self._bounds: dict[torch.device, Boundaries] = {}
        self._masks: dict[tuple, Tensor] = {}

    @property
    def lengths(self) -> list[int]:
        return [part.length for part in self.parts]

    def entries(self) -> int:
        """(query, key) entries that attention reads."""
        return sum(p.length * p.prefix + p.length * (p.length + 1) // 2 for p in self.parts)

    def bounds(self, device: torch.device | str) -> Boundaries:
        """On `device`; copied there once, whatever the number of layers that ask."""
        device = torch.device(device)
        if device not in self._bounds:
            self._bounds[device] = self._make_bounds(device)
        return self._bounds[device]

    def _make_bounds(self, device: torch.device) -> Boundaries:
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + part.length)
        counts = [part.prefix + part.length for part in self.parts]
        cu_k = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        keys = None
        if any(part.prefix for part in self.parts):
            spans = []
            for part, start in zip(self.parts, starts, strict=False):
                if part.prefix:
                    spans.append(
                        torch.arange(starts[part.parent], starts[part.parent] + part.prefix)
                    )
                spans.append(torch.arange(start, start + part.length))
            keys = to_device(torch.cat(spans), device)
        return Boundaries(
            to_device(torch.tensor(starts, dtype=torch.int32), device),
            to_device(cu_k, device),
            keys,
            max(self.lengths, default=0),
            max(counts, default=0),
        )

    def seen(self, part: Segment, window: int | None, device: torch.device) -> Tensor | None:
        """[length, prefix + length] bool, True where a query sees a key; None: plain causal."""
        Q, K = part.length, part.prefix + part.length
        if Q == K and (window is None or window >= K):
            return None
        if window is not None and window >= K:
            window = None
        name = Q, K, window, device
        if name not in self._masks:
            at = torch.arange(K - Q, K, device=device)[:, None] - torch.arange(K, device=device)
            self._masks[name] = (at >= 0) if window is None else (at >= 0) & (at < window)
        return self._masks[name]
