"""Trainers that keep their own loss and get log-probs without logits: LLaMA-Factory's, ms-swift's.

Both have a TRL trainer's bones and a forward, a loss and metrics of their own. What is exchanged is
the forward, which is where the logits are; every loss option of theirs stays their code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.attached import attach_head
from ..models.forward import scored_tokens
from ..models.options import FusedOptions
from ..models.step0 import check_step0
from ..models.structure import deterministic
from . import frameworks, hf_trainer, shapes
from .announce import announce, opt_out
from .first_step import check_first_loss, check_first_rows, note_loss, watch_first_step
from .patching import Overrides, Patched, Undo, apply_all, options_of, undo_all


class RowScores(NamedTuple):
    """Of rows [chosen; rejected]: what a forward of theirs is made from."""

    logps: Tensor  # [2B, T - 1], 0 where not scored
    mean_logits: Tensor | None  # [2B, T - 1], likewise
    scored: Tensor  # [2B, T - 1]
    aux_loss: Tensor | None

    @property
    def counts(self) -> Tensor:
        return self.scored.sum(1)


class Framework:
    """A framework of such a trainer: the patch of its class, put in and taken off."""

    def __init__(self, trainer: shapes.Trainer, overrides: Callable[[], Overrides]) -> None:
        self.trainer, self.overrides = trainer, overrides
        self._known: dict[type, Patched] = {}

    def target_of(self, kind: type) -> Patched:
        """The patch of this class; `UnsupportedShape` where it is another."""
        if kind not in self._known or not self._known[kind].active:
            version = frameworks.version_of(self.trainer.package)
            shapes.shape_of(self.trainer, shapes.methods_of(kind), version)
            patch = self.trainer.patch
            self._known[kind] = Patched(kind, self.overrides(), patch=patch, advice=lambda _: "")
        return self._known[kind]

    def patch(
        self,
        fused: FusedOptions | dict[str, Any] | None,
        allow_untested: bool,
        on_bypass: str,
        options: dict[str, Any],
    ) -> Undo:
        chosen = _fused_options(options_of(fused, on_bypass, options))
        frameworks.check_version(self.trainer.package, allow_untested=allow_untested)
        return apply_all([self.target_of(shapes.class_of(self.trainer))], chosen, on_bypass)

    def unpatch(self) -> None:
        undo_all(self._known.values())


ReferenceLogps = Callable[[Any, Any, dict[str, Any]], tuple[Tensor, Tensor] | None]


def overrides(
    forward: Callable, refuse: Callable[[Any], None], reference_logps: ReferenceLogps
) -> Overrides:
    """What is exchanged: their forward, and what looks at trainer and models around it."""
    return {
        "__init__": functools.partial(_init, refuse=refuse),
        "concatenated_forward": forward,
        "get_batch_loss_metrics": functools.partial(_first_step, reference_logps=reference_logps),
    }


def _init(original: Callable, refuse: Callable[[Any], None]) -> Callable:
    """Their `__init__`, with the head below what accelerate wraps policy and reference in."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.fused = type(self).fused_default
        self._reference_seen = False
        given = signature.bind(self, *args, **kwargs).arguments
        for name in ("model", "ref_model"):
            if isinstance(given.get(name), nn.Module):
                attach_head(given[name])
        original(self, *args, **kwargs)
        refuse(self)
        watch_first_step(self)

    return __init__


def row_scores(
    trainer: Any, model: nn.Module, inputs: dict[str, Any], labels: Tensor, reference: bool
) -> RowScores:
    """Log-probs of the scored tokens of `model`, in its own precision."""
    attach_head(trainer.accelerator.unwrap_model(model))
    if not reference and torch.is_grad_enabled() and not getattr(trainer, "_reference_seen", True):
        check_first_rows(trainer, labels)
    stats = () if reference or not trainer.fused.head_stats else ("mean_logits",)
    out = scored_tokens(model, inputs, labels, trainer.fused, stats)
    assert out.logps is not None
    scored = (labels[:, 1:] != -100).to(out.logps.device)
    return RowScores(out.logps, out.mean_logits, scored, out.aux_loss)


def weighted_sums(rows: RowScores, position: Tensor, ld_alpha: float | None) -> Tensor:
    """[2B] log-probs; with `ld_alpha` what a completion has beyond the shorter one weighs that.

    `position` [2B, T - 1] counts from 0 at a row's first scored token.
    """
    if ld_alpha is None:
        return rows.logps.sum(1)
    shared = torch.minimum(*rows.counts.chunk(2)).repeat(2)[:, None]
    return torch.where(position < shared, rows.logps, ld_alpha * rows.logps).sum(1)


def _first_step(original: Callable, reference_logps: ReferenceLogps) -> Callable:
    """Their `get_batch_loss_metrics`; before the first step both models are looked at."""

    @functools.wraps(original)
    def get_batch_loss_metrics(
        self: Any, model: Any, batch: dict[str, Any], train_eval: str = "train", **kwargs: Any
    ) -> Any:
        first = train_eval == "train" and not self._reference_seen
        if first:
            hf_trainer.check_head_of(self)
            if self.fused.check_reference and not self.state.global_step:
                _check_reference(self, model, batch, reference_logps)
        result = original(self, model, batch, train_eval, **kwargs)
        if first and isinstance(result[0], Tensor):
            check_first_loss(self, result[0])
        if train_eval == "train" and isinstance(result[0], Tensor):
            note_loss(self, result[0])
        if first:
            self._reference_seen = True
            announce(self, hf_trainer.model_dtype(self), None)
        return result

    return get_batch_loss_metrics


def _check_reference(
    trainer: Any, model: Any, batch: dict[str, Any], reference_logps: ReferenceLogps
) -> None:
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its own forward belongs to the step
    looking: AbstractContextManager = deterministic(model)
    with torch.no_grad(), looking:
        theirs = reference_logps(trainer, model, dict(batch))
        if theirs is None:
            return
        ours = trainer.concatenated_forward(model, dict(batch), is_ref_model=True)
    policy = torch.stack([ours["chosen_logps"], ours["rejected_logps"]])
    rewards = policy - torch.stack(list(theirs)).to(policy)
    unless = opt_out(trainer, "check_reference")
    check_step0(rewards, policy, {"beta": 1.0}, hf_trainer.model_dtype(trainer), unless)


def refuse(trainer: Any, given: dict[str, bool]) -> None:
    """`ValueError` with the names of what is on in `given` and not done here."""
    names = [name for name, on in given.items() if on]
    if names:
        raise ValueError(
            f"the fused head of {type(trainer).__name__} does not take {', '.join(names)}"
        )


def _fused_options(fused: FusedOptions) -> FusedOptions:
    """`FusedOptions` that such a trainer can follow."""
    for name in ("reference_cache", "ref_adapter_name"):
        if getattr(fused, name) is not None:
            raise ValueError(f"{name}: the reference stays the framework's own here")
    if fused.loss_options:
        raise ValueError(
            f"loss_options: the loss stays the framework's own here; set its own options instead "
            f"of {', '.join(fused.loss_options)}"
        )
    return fused
