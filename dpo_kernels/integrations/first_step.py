"""The checks around step 1, and of log-probs that fall, for transformers' Trainer and TRL's."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from ..models.falling import FallingLogps, fallen, falling_text
from ..models.mesh_axes import check_parallelism
from ..models.nonfinite import LossWatch, NonFiniteLoss
from ..models.options import FusedOptions
from ..models.references import needs_reference
from ..models.step1 import FirstStep, FirstStepError, check_connected, check_rows, eos_ids_of
from .announce import opt_out

_CHECK = "check_first_step"


class FirstStepCallback(TrainerCallback):
    """Watches the first optimizer step of a trainer, and what is logged later."""

    def __init__(
        self, fused: FusedOptions, falling: bool = True, beta: float = 0.1, opt_out: str = ""
    ) -> None:
        self.fused, self.beta, self.opt_out = fused, beta, opt_out
        self.on_falling = fused.on_falling_logps if falling else "ignore"
        self.watch: FirstStep | None = None
        self.loss: Tensor | None = None  # the first
        self.losses = LossWatch(said=fused.on_nonfinite_loss == "ignore")
        self.decode: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        tokenizer = kwargs.get("processing_class")
        self.decode = getattr(tokenizer, "decode", None)
        if model is not None and not state.global_step and self.fused.check_first_step:
            self.watch = FirstStep(model, self.opt_out)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.after_backward(self.loss)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch is None:
            return
        left = state.max_steps - state.global_step - 1 if state.max_steps > 0 else None
        self.watch.after_step(kwargs["optimizer"], schedule=kwargs.get("lr_scheduler"), left=left)
        for text in self.watch.warnings:
            warnings.warn(text, stacklevel=2)
        self.watch.warnings.clear()
        if self.watch.done:
            self.watch = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A loss that is not finite; log-probs that fall together, by the means that are logged."""
        text = self.losses.look(self.decode)
        if text and self.fused.on_nonfinite_loss == "stop":
            raise NonFiniteLoss(text)
        if text:
            warnings.warn(text, stacklevel=2)
        names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
        if self.on_falling == "ignore" or not logs or any(n not in logs for n in names):
            return
        ratios = [float(logs[n]) / self.beta for n in names[:2]]
        ref = [float(logs[n]) - r for n, r in zip(names[2:], ratios, strict=True)]
        if not fallen(ratios[0], ratios[1], ref[0], ref[1]):
            return
        text = falling_text(*ratios)
        if self.on_falling == "stop":
            raise FallingLogps(text)
        self.on_falling = "ignore"
        warnings.warn(text, stacklevel=2)


def _options_of(trainer: Any) -> dict[str, Any]:
    """loss_type, beta and reference_free, wherever the framework has them."""
    args = trainer.args
    options = {
        "loss_type": getattr(trainer, "loss_type", None) or getattr(args, "loss_type", "sigmoid"),
        "beta": getattr(trainer, "beta", None) or getattr(args, "beta", 0.1),
        "reference_free": bool(getattr(trainer, "reference_free", False)),
    }
    return {**options, **trainer.fused.loss_options, **(getattr(trainer, "loss_options", {}))}


def _has_reference(options: dict[str, Any]) -> bool:
    try:
        return needs_reference(options)
    except ValueError:  # a loss that is the framework's alone
        return True


def watch_first_step(trainer: Any) -> None:
    """Give a trainer the callback; what splits its model's trunk is refused."""
    check_parallelism(trainer.accelerator)
    options = _options_of(trainer)
    beta = options["beta"]
    beta = beta[0] if isinstance(beta, list) else beta  # of OnlineDPO's epochs
    mean = float(beta.float().mean()) if isinstance(beta, Tensor) else float(beta or 0.1)
    falling, unless = _has_reference(options), opt_out(trainer, _CHECK)
    trainer._first_step = FirstStepCallback(trainer.fused, falling, mean, unless)
    trainer.add_callback(trainer._first_step)


def note_loss(trainer: Any, loss: Tensor, ids: Tensor | None = None) -> None:
    """The loss of a training batch, and the token ids of its rows."""
    trainer._first_step.losses.add(loss, trainer.state.global_step + 1, ids)


def check_rows_left(trainer: Any, given: Any) -> None:
    """`FirstStepError` where a trainer has left out every row that it was given."""
    if not trainer.fused.check_first_step:
        return
    left: Any = getattr(trainer, "train_dataset", None)
    if not hasattr(given, "__len__") or not hasattr(left, "__len__") or len(left) or not len(given):
        return
    limit = getattr(trainer.args, "max_length", None)
    raise FirstStepError(
        f"no token of train_dataset is scored: the labels of all its {len(given)} rows would be "
        f"masked (-100), so {type(trainer).__name__} has left them out. Completions are empty, or "
        f"the prompts alone fill max_length={limit}"
    )


def check_first_rows(trainer: Any, labels: Tensor) -> None:
    """The rows of the first batch [2B, T]: scored, and ended once."""
    if trainer.fused.check_first_step:
        tokenizer = getattr(trainer, "processing_class", None)
        eos_ids = eos_ids_of(trainer.model, tokenizer)
        check_rows(labels, eos_ids, opt_out=opt_out(trainer, _CHECK))


def check_first_loss(trainer: Any, loss: Tensor) -> None:
    """The first loss has a gradient to give."""
    if trainer.fused.check_first_step:
        check_connected(trainer.model, loss)
        trainer._first_step.loss = loss.detach()
