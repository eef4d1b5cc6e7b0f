"""Optimizer, schedule, and the guarded step that SFT and DPO share."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.step1 import MOVED, FirstStep, FirstStepError
from .config import DPOTrainConfig, UserError, nearest

__all__ = ["MOVED", "Stepper", "TrainingError", "make_optimizer", "make_schedule"]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why. The weights are as before the step."""


def make_optimizer(
    model: nn.Module, config: DPOTrainConfig, groups: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; norms and biases are not decayed.

    Which those are is told as transformers' Trainer tells it, by layer and by name.
    `groups`: what is trained beside the model, at `group_learning_rate`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = _undecayed(model)
    parts: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p not in plain], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p in plain], "weight_decay": 0.0},
    ]
    if groups is not None:
        rate = config.group_learning_rate
        parts.append({"params": list(groups.parameters()), "weight_decay": 0.0, "lr": rate})
    parts = [part for part in parts if part["params"]]
    if config.optim == "sgd":
        return torch.optim.SGD(parts, lr=config.learning_rate)
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(parts, lr=config.learning_rate)
    if config.optim == "adagrad":
        return torch.optim.Adagrad(parts, lr=config.learning_rate)
    if config.optim == "adafactor":
        from transformers.optimization import Adafactor

        # As transformers' Trainer has it: the schedule is ours, no scale of its own.
        return Adafactor(parts, lr=config.learning_rate, scale_parameter=False, relative_step=False)
    # fused: one pass over each parameter, where the plain loop makes several over memory. It takes
    # weights of one mesh.
    meshes = {getattr(p, "device_mesh", None) for p in parameters}
    return torch.optim.AdamW(
        parts,
        lr=config.learning_rate,
        eps=config.adam_epsilon,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=len(meshes) == 1,
        foreach=False if len(meshes) > 1 else None,
    )


# As transformers has it (`Trainer.get_decay_parameter_names`), where it is a method.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")


def _undecayed(model: nn.Module) -> set[Tensor]:
    """Norms and biases, by what they are or are called.

    A vector may be neither: DoRA's magnitudes are decayed.
    """
    named = {p for n, p in model.named_parameters() if _UNDECAYED.search(n.lower())}
    norms = (m for m in model.modules() if "Norm" in type(m).__name__)
    return named.union(*(m.parameters(recurse=False) for m in norms))


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
    more = config.lr_scheduler_kwargs
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=more if isinstance(more, dict) else None,
    )


def check_schedule(config: DPOTrainConfig) -> None:
    """The schedule takes what `lr_scheduler_kwargs` gives it, before anything is loaded."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    name, given = config.lr_scheduler_type, config.lr_scheduler_kwargs or {}
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    # `constant` takes nothing: transformers would drop what it is given.
    known = set() if name.startswith("constant") else {*inspect.signature(function).parameters}
    known -= {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for key in given:
        if key not in known:
            hint = nearest(key, sorted(known))
            raise UserError(
                f"lr_scheduler_kwargs: {key!r} is not of {name}{hint}: it takes "
                f"{', '.join(sorted(known)) or 'nothing'}"
            )
    try:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate or 1.0)
        schedule = make_schedule(optimizer, config, 10)
        for _ in range(3):
            optimizer.step()
            schedule.step()
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler_kwargs={given!r} of {name}: {error}") from None


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """The norm of all gradients, which are scaled to `most`; those in shards count whole."""
    sharded = [p for p in parameters if hasattr(p, "full_tensor")]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, most)
    parts: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        parts.setdefault(getattr(p, "device_mesh", None), []).append(p)
    norms = []
    for part in parts.values():
        norm = nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    total = torch.stack([n.to(norms[0]) for n in norms]).norm()
    for part in parts.values():
        nn.utils.clip_grads_with_norm_(part, most, total)
    return total


class Stepper:
    """Clip, check, step, schedule: what ends every optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        config: DPOTrainConfig,
        steps: int,
        groups: nn.Module | None = None,
    ) -> None:
        self.optimizer = make_optimizer(model, config, groups)
        self.schedule, self.steps = make_schedule(self.optimizer, config, steps), steps
        names = {p: name for name, p in model.named_parameters()}
        if groups is not None:
            names |= {p: f"groups.{name}" for name, p in groups.named_parameters()}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise UserError("the model has no parameter that requires a gradient")
        # In the optimizer's order, which its own state goes by.
        self.names = [names[p] for group in self.optimizer.param_groups for p in group["params"]]
        self.max_norm = config.max_grad_norm or math.inf
        self.warning = ""  # set by the first step that should move anything
        self._first = FirstStep(model, "--check_first_step false")
        self._first.done = not config.check_first_step

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(
        self,
        loss: Tensor,
        what: str,
        sources: list[str],
        may_skip: bool = False,
        blame: Callable[[], str] = str,
    ) -> dict[str, Any]:
        """One step; `TrainingError` before the weights are touched if anything is not finite.

        `may_skip`: the step is then left out instead, and the result has `skipped`, a text.
        `blame` says which ranks it came from.
        """
        norm = clip_gradients(self.parameters, self.max_norm)
        # One wait for the device: both numbers come together.
        values = torch.stack([loss.detach().double(), norm.double()]).tolist()
        named = zip(("the loss", "the gradient norm"), values, strict=True)
        bad = [f"{name} is {value}" for name, value in named if not math.isfinite(value)]
        rate = self.learning_rate
        if bad:
            shown = ", ".join(sources[:16]) + (", ..." if len(sources) > 16 else "")
            said = f"{what}: {' and '.join(bad)}{blame()}; the weights were not changed."
            text = f"{said} In this step: {shown}"
            if not may_skip:
                failed = TrainingError(text)
                failed.agreed = True  # type: ignore[attr-defined]  # every rank has the same sums
                raise failed
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            return {"learning_rate": rate, "skipped": text}
        try:
            self._first.after_backward(loss)
            self.optimizer.step()
            left = self.steps - self.schedule.last_epoch - 1
            self._first.after_step(self.optimizer, schedule=self.schedule, left=left)
        except FirstStepError as error:
            raise TrainingError(f"{what}: {error}") from None
        self.warning = "\n".join(f"warning: {text}" for text in self._first.warnings)
        self._first.warnings.clear()
        self.schedule.step()
        # None, not zeros: gradients then take no memory while the next forward runs
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": values[1], "learning_rate": rate}

    def state(self) -> dict[str, dict[str, Any]]:
        """What the optimizer keeps of each parameter, by its name."""
        every = [p for group in self.optimizer.param_groups for p in group["params"]]
        pairs = zip(self.names, every, strict=True)
        return {n: dict(self.optimizer.state[p]) for n, p in pairs if p in self.optimizer.state}

    def group_options(self) -> list[dict[str, Any]]:
        """Rates and the like of the optimizer's groups."""
        return [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]

    def schedule_state(self) -> dict[str, Any]:
        """The schedule's position; its functions are made anew."""
        return {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}

    def restore(
        self,
        state: Mapping[str, dict[str, Any]],
        groups: list[dict[str, Any]],
        schedule: dict[str, Any],
    ) -> None:
        """Put back what `state`, `group_options` and `schedule_state` gave."""
        whole = self.optimizer.state_dict()
        whole["state"] = {i: state[name] for i, name in enumerate(self.names) if name in state}
        for group, kept in zip(whole["param_groups"], groups, strict=True):
            group |= {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
        self.optimizer.load_state_dict(whole)
        functions = self.schedule.state_dict().get("lr_lambdas", [])
        self.schedule.load_state_dict({**schedule, "lr_lambdas": functions})
