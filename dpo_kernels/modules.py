"""The losses as modules: options given once, and the state of the losses that keep one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import losses as _losses
from .dpo import fused_dpo_loss
from .linear import fused_linear_dpo_loss
from .pairs import DPOOutput


class _LossModule(torch.nn.Module):
    """Options given once; the same arguments at call, where keywords override them."""

    function: Callable[..., DPOOutput]
    state: Tensor | None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        known = _losses.LossOptions.__dataclass_fields__
        chosen = {k: v for k, v in options.items() if k in known}
        rows = [_losses.get(name) for name in _losses.names_of(chosen.get("loss_type", "sigmoid"))]
        # odpo's offset comes with each batch: everything else is checked now, at construction.
        if not any(row.name == "odpo" for row in rows):
            _losses.resolve(chosen)
        beta_dpo = any(row.name == "beta_dpo" for row in rows)
        # Running mean and deviation of the margin: the state of beta-DPO, saved with the module.
        state = torch.zeros(2, dtype=torch.float64) if beta_dpo else None
        self.register_buffer("state", state)

    def forward(self, *args: Any, **kwargs: Any) -> DPOOutput:
        merged = {**self.options, **kwargs}
        if self.state is not None:
            merged["beta_dpo_state"] = self.state if self.training else self.state.clone()
        return type(self).function(*args, **merged)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class FusedDPOLoss(_LossModule):
    """`fused_dpo_loss` as a module: `FusedDPOLoss(**options)(logits, labels, ref_logits, ...)`."""

    function = staticmethod(fused_dpo_loss)


class FusedLinearDPOLoss(_LossModule):
    """`fused_linear_dpo_loss` as a module: `FusedLinearDPOLoss(**options)(hidden, weight, ...)`."""

    function = staticmethod(fused_linear_dpo_loss)
