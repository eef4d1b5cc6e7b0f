"""What happens to a logit before the softmax: z = softcap(logit_scale * x) / temperature.

Gemma 2 soft-caps its logits (cap * tanh(x / cap)), Cohere and Granite scale them, and a
temperature flattens them. One small value object says which, so each op and backend takes one
argument, and the formula and its derivative stand in one place for plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks


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
        t = checks.positive("temperature", temperature)
        scale = checks.number("logit_scale", logit_scale)
        cap = 0.0
        if logit_softcap is not None:
            cap = checks.positive(
                "logit_softcap", logit_softcap, "None or a positive finite number"
            )
        given = {"temperature": t, "logit_softcap": cap, "logit_scale": abs(scale)}
        for name, x in given.items():
            if x and not checks.FP32.tiny <= x <= 1 / checks.FP32.tiny:
                raise ValueError(
                    f"{name} must be within the range of fp32, in which it is computed, got {x!r}"
                )
        if max(abs(scale) / t, cap / t, abs(scale) / cap if cap else 0.0) > checks.FP32.max:
            raise ValueError(
                "temperature, logit_softcap and logit_scale must have quotients within the range "
                f"of fp32, got {t!r}, {logit_softcap!r} and {scale!r}"
            )
        return LogitTransform(scale, cap, 1.0 / t)

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
