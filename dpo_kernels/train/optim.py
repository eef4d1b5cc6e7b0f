"""Optimizer, schedule, and the guarded step that SFT and DPO share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..models.step1 import MOVED, FirstStep, FirstStepError
from .config import DPOTrainConfig, UserError

__all__ = [
    "MOVED",
    "Stepper",
    "TrainingError",
    "epoch_order",
    "make_optimizer",
    "make_schedule",
    "total_steps",
]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why. The weights are as before the step."""


def make_optimizer(model: nn.Module, config: DPOTrainConfig) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; norms and biases are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.learning_rate)
    # fused: one pass over each parameter, where the plain loop makes several over memory
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        eps=config.adam_epsilon,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: DPOTrainConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule by name, with the warm-up in steps or as a share of them."""
    from transformers import get_scheduler

    warmup = config.warmup_steps
    warmup = int(warmup) if warmup >= 1 else math.ceil(warmup * steps)
    name = config.lr_scheduler_type
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


class Stepper:
    """Clip, check, step, schedule: what ends every optimizer step."""

    def __init__(self, model: nn.Module, config: DPOTrainConfig, steps: int) -> None:
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config, steps)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise UserError("the model has no parameter that requires a gradient")
        self.max_norm = config.max_grad_norm or math.inf
        self.warning = ""  # set by the first step that should move anything
        self._first = FirstStep(model, "--check_first_step false")
        self._first.done = not config.check_first_step

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self, loss: Tensor, what: str, sources: list[str]) -> dict[str, Any]:
        """One step; `TrainingError` before the weights are touched if anything is not finite."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        bad = [
            f"{name} is {float(value)}"
            for name, value in (("the loss", loss), ("the gradient norm", norm))
            if not bool(torch.isfinite(value))
        ]
        if bad:
            shown = ", ".join(sources[:16]) + (", ..." if len(sources) > 16 else "")
            raise TrainingError(
                f"{what}: {' and '.join(bad)}; the weights were not changed. In this step: {shown}"
            )
        rate = self.learning_rate
        try:
            self._first.after_backward(loss)
            self.optimizer.step()
            self._first.after_step(self.optimizer)
        except FirstStepError as error:
            raise TrainingError(f"{what}: {error}") from None
        self.warning = "\n".join(f"warning: {text}" for text in self._first.warnings)
        self._first.warnings.clear()
        self.schedule.step()
        # None, not zeros: gradients then take no memory while the next forward runs
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": float(norm), "learning_rate": rate}


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of `n` pairs in an epoch: a function of (seed, epoch) alone."""
    if not shuffle:
        return list(range(n))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def total_steps(n: int, per_step: int, config: DPOTrainConfig) -> int:
    """Optimizer steps of the run: `max_steps`, or epochs of ceil(n / per_step) steps."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(n / per_step))
