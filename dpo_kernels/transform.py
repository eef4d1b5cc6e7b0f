"""What happens to a logit before the softmax: z = softcap(logit_scale * x) / temperature.

Gemma 2 soft-caps its logits (cap * tanh(x / cap)), Cohere and Granite scale them, and a
temperature flattens them. One small value object says which, so each op and backend takes one
argument, and the formula and its derivative stand in one place for plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap(scale * x) * inv_temperature; `softcap` 0 means none."""

    scale: float = 1.0
    softcap: float = 0.0
    inv_temperature: float = 1.0

    @staticmethod
    def of(
        temperature: float = 1.0, logit_softcap: float | None = None, logit_scale: float = 1.0
    ) -> LogitTransform:
        """From the public arguments, checked."""
        if not temperature > 0 or temperature == float("inf"):
            raise ValueError(f"temperature must be a positive finite number, got {temperature!r}")
        if logit_softcap is not None and not 0 < logit_softcap < float("inf"):
            raise ValueError(
                f"logit_softcap must be None or a positive finite number, got {logit_softcap!r}"
            )
        if not abs(logit_scale) < float("inf"):
            raise ValueError(f"logit_scale must be a finite number, got {logit_scale!r}")
        return LogitTransform(float(logit_scale), float(logit_softcap or 0.0), 1.0 / temperature)

    def __call__(self, x: Tensor) -> Tensor:
        if self.scale != 1.0:
            x = x * self.scale
        if self.softcap:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x * self.inv_temperature if self.inv_temperature != 1.0 else x

    def derivative(self, x: Tensor) -> Tensor | float:
        """dz/dx."""
        slope = self.scale * self.inv_temperature
        if not self.softcap:
            return slope
        # 1 - tanh^2 as 1/cosh^2 would overflow; as (1 - t)(1 + t) it loses nothing that matters.
        t = torch.tanh(x * (self.scale / self.softcap))
        return slope * (1 - t) * (1 + t)
