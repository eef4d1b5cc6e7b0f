"""A loss that is not finite: said with its step and its rows, when there is a look at the device.

From such a step on every weight is NaN, and a trainer that logs means, or leaves NaN out of them,
goes on as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHOICES = ("warn", "stop", "ignore")
HELP = (
    "a smaller learning_rate, a larger beta, gradients that are clipped, bf16 or fp32 in place of "
    "fp16; or a loss of bounded slope: loss_type sigmoid, hinge or apo_zero"
)
_SHOWN = 3  # rows that are named
_TOKENS = 12  # of each


class NonFiniteLoss(RuntimeError):
    """The loss is not finite, and that was to end the run."""


@dataclass
class LossWatch:
    """Collects losses of steps; `look` says which are not finite, once."""

    said: bool = False
    _losses: list[Tensor] = field(default_factory=list)
    _rows: list[tuple[int, Tensor | None]] = field(default_factory=list)

    def add(self, loss: Tensor, step: int, ids: Tensor | None = None) -> None:
        """The loss of a step, detached, and its rows' token ids [2B, T]. Nothing is waited for."""
        if not self.said:
            self._losses.append(loss.detach().sum())
            self._rows.append((step, None if ids is None else ids[:_SHOWN, :_TOKENS]))

    def look(self, decode: Callable[[list[int]], str] | None = None) -> str:
        """What there is to say of the steps since the last look; "" if nothing."""
        losses, rows, self._losses, self._rows = self._losses, self._rows, [], []
        if self.said or not losses:
            return ""
        values = torch.stack([x.double().to(losses[0].device) for x in losses]).tolist()
        bad = [i for i, value in enumerate(values) if not abs(value) < float("inf")]
        if not bad:
            return ""
        self.said = True
        step, ids = rows[bad[0]]
        shown = ""
        if ids is not None:
            texts = [decode(row) if decode else str(row) for row in ids.tolist()]
            shown = ". Its rows begin: " + ", ".join(repr(text) for text in texts)
        return f"the loss of step {step} is {values[bad[0]]}: {HELP}{shown}"
