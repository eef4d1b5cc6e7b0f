"""The checks around the first step of a loop of the user's own, which has nothing to call for them.

`dpo_step` looks at the rows; the optimizer that holds the model's weights tells, by its hooks, when
gradients are there and when the weights should have moved. Then the hooks are gone.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..models.attached import HeadOutput
from ..models.falling import FallingLogps, FallingWatch
from ..models.nonfinite import LossWatch, NonFiniteLoss
from ..models.options import FusedOptions
from ..models.step1 import FirstStep, check_connected, check_rows, eos_ids_of

OPT_OUT = "dpo_step(..., fused={'check_first_step': False})"
EVERY = 10  # steps between looks at log-probs that fall: each look waits for the device


class Later:
    """What is looked at after the first step, now and then: losses, and log-probs that fall."""

    def __init__(self, fused: FusedOptions, every: int | None = None) -> None:
        self.fused, self.every, self.steps = fused, every or EVERY, 0
        self.falling = FallingWatch(said=fused.on_falling_logps == "ignore")
        self.losses = LossWatch(said=fused.on_nonfinite_loss == "ignore")

    def add(self, out: HeadOutput, beta: float | Tensor | None, ids: Tensor | None = None) -> None:
        """One training batch; `beta` of its log-ratios, None where there is no reference."""
        assert out.loss is not None and out.rewards is not None and out.pair_logps is not None
        self.steps += 1
        self.losses.add(out.loss, self.steps, ids)
        if beta is not None:
            names = [f"pair {i} of step {self.steps}" for i in range(out.rewards.shape[1])]
            self.falling.add(out.rewards, out.pair_logps, beta, names)
        if self.steps % self.every:
            return
        for text, choice, error in (
            (self.losses.look(), self.fused.on_nonfinite_loss, NonFiniteLoss),
            (self.falling.look(), self.fused.on_falling_logps, FallingLogps),
        ):
            if text and choice == "stop":
                raise error(text)
            if text:
                warnings.warn(text, stacklevel=3)


class Watch:
    """What is looked at of one model. It holds the model weakly, until an optimizer steps."""

    def __init__(self, model: nn.Module, fused: FusedOptions) -> None:
        self.model, self.fused = weakref.ref(model), fused
        self.later = Later(fused)
        self.rows_seen = self.armed = False
        self.loss: Tensor | None = None
        self.first: FirstStep | None = None

    def rows(self, labels: Tensor) -> None:
        """Before the first forward."""
        model = self.model()
        if not self.rows_seen and model is not None and self.fused.check_first_step:
            check_rows(labels, eos_ids_of(model), opt_out=OPT_OUT)
            self.rows_seen = True

    def forward(self, out: HeadOutput) -> None:
        """Behind it: from now on optimizers are looked at."""
        model = self.model()
        if self.armed or out.loss is None or model is None or not self.fused.check_first_step:
            return
        if not out.loss.requires_grad:
            if model.training:  # else an evaluation, perhaps
                check_connected(model, out.loss)
            return
        self.armed, self.loss = True, out.loss.detach()
        _waiting.append(self)
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before))
            _hooks.append(register_optimizer_step_post_hook(_behind))

    def _ours(self, optimizer: Any) -> set[int]:
        """The ids of the model's weights that this optimizer holds."""
        model = self.model()
        if model is None:
            self._end()
            return set()
        mine = {id(p) for p in model.parameters()}
        return mine & {id(p) for group in optimizer.param_groups for p in group["params"]}

    def before(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """A step of any optimizer begins."""
        if not self._ours(optimizer):
            return
        given = args[1:] if args[:1] == (optimizer,) else args
        if any(callable(x) for x in (*given, kwargs.get("closure"))):
            self._end()  # the backward is within the step: there is nothing to see yet
            return
        if self.first is None:
            model = self.model()
            assert model is not None
            self.first = FirstStep(model, OPT_OUT)
        self.first.after_backward(self.loss)

    def behind(self, optimizer: Any) -> None:
        """It is over."""
        if self.first is None or not (ours := self._ours(optimizer)):
            return
        self.first.after_step(optimizer, ours)
        for text in self.first.warnings:
            warnings.warn(text, stacklevel=3)
        self.first.warnings.clear()
        if self.first.done:
            self._end()

    def _end(self) -> None:
        self.first = self.loss = None
        if self in _waiting:
            _waiting.remove(self)


_waiting: list[Watch] = []
_hooks: list[Any] = []  # of all optimizers, while a watch waits for a step of one


def _before(optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    for watch in tuple(_waiting):
        watch.before(optimizer, args, kwargs)


def _behind(optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    for watch in tuple(_waiting):
        watch.behind(optimizer)


def _tidy() -> None:
    """Take the hooks away where nothing waits any more; within a step it cannot be done."""
    for watch in [w for w in _waiting if w.model() is None]:
        _waiting.remove(watch)
    while _hooks and not _waiting:
        _hooks.pop().remove()


_watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def watch_of(model: nn.Module, fused: FusedOptions) -> Watch | None:
    """The watch of a model that is trained here; None where nothing is to be looked at."""
    _tidy()
    if not torch.is_grad_enabled():
        return None
    found = _watches.get(model)
    if found is None or found.fused != fused:
        found = _watches[model] = Watch(model, fused)
    return found
