"""An exponential moving average of the trained weights, beside the weights themselves.

It starts as they are and follows each step by 1 - decay, at first faster (with the decay
min(ema_decay, (1 + step) / (10 + step))), so that a short run is not an average of its start. The
run's last evaluation and `model/` are of the average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """The average of a model's trained weights; in fp32 at least."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = {n: _wide(p) for n, p in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self._trained():
            self.values[name].lerp_(p.to(self.values[name].dtype), 1 - decay)

    @torch.no_grad()
    def put_into_model(self) -> None:
        """The weights are the average from here on."""
        for name, p in self._trained():
            p.copy_(self.values[name])

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self.values.items():
            value.copy_(state[name])


def _wide(p: Tensor) -> Tensor:
    return p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
