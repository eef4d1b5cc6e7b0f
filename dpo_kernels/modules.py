"""The losses as modules: options given once, and the state of the losses that keep one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import losses as _losses
from .dpo import fused_dpo_loss
from .inputs import arguments, checks
from .linear_dpo import fused_linear_dpo_loss
from .loss.from_pairs import DPOOutput


class _LossModule(torch.nn.Module):
    """Options given once; the same arguments at call, where keywords override them."""

    function: Callable[..., DPOOutput]
    state: Tensor | None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = _losses.LossOptions.__dataclass_fields__
        call = inspect.signature(type(self).function).parameters.values()
        keywords = [p.name for p in call if p.kind == p.KEYWORD_ONLY]
        checks.names(options, [*keywords, *known], "option")
        arguments.check(**options)
        chosen = {k: v for k, v in options.items() if k in known}
        loss_type = chosen.get("loss_type", _losses.LossOptions.loss_type)
        # What a loss requires may come with each batch: everything else is checked now.
        late = {x: torch.zeros(1) for x in _losses.requires(loss_type) if chosen.get(x) is None}
        _losses.resolve({**chosen, **late})
        # What the loss is made of belongs to the module: it is trained with it, moves with it.
        mine = [name for name, x in chosen.items() if isinstance(x, Tensor)]
        for name in mine:
            if isinstance(options[name], torch.nn.Parameter):
                self.register_parameter(name, options[name])
            else:
                self.register_buffer(name, options[name], persistent=False)
        self._given = tuple(options)
        self._plain = {k: v for k, v in options.items() if k not in mine}
        # What the loss keeps from batch to batch is saved with the module.
        self._state_name, state = next(iter(_losses.fresh_state(loss_type).items()), ("", None))
        self.register_buffer("state", state)

    @property
    def options(self) -> dict[str, Any]:
        return {k: self._plain[k] if k in self._plain else getattr(self, k) for k in self._given}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _LossModule:
        """`.half()` and the like are for parameters: buffers keep their dtype (beta-DPO's fp64)."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, *args: Any, **kwargs: Any) -> DPOOutput:
        merged = {**self.options, **kwargs}
        if self.state is not None:
            merged[self._state_name] = self.state if self.training else self.state.clone()
        return type(self).function(*args, **merged)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class FusedDPOLoss(_LossModule):
    """`fused_dpo_loss` as a module: `FusedDPOLoss(**options)(logits, labels, ref_logits, ...)`."""

    function = staticmethod(fused_dpo_loss)


class FusedLinearDPOLoss(_LossModule):
    """`fused_linear_dpo_loss` as a module: `FusedLinearDPOLoss(**options)(hidden, weight, ...)`."""

    function = staticmethod(fused_linear_dpo_loss)
