"""LLaMA-Factory's DPO trainer with the fused head.

    from dpo_kernels.integrations.llamafactory import patch_llamafactory
    patch_llamafactory()                # before its trainer is built; unpatch_llamafactory() undoes

or, without a line of Python: `dpo-kernels run -- llamafactory-cli train x.yaml`.

Its trainer has a forward of its own, which makes the logits: that is exchanged, below whatever
accelerate wraps the models in, so that their precision stays the configured one. Its losses
(`pref_loss`, `pref_beta`, `pref_ftx`, `pref_bco_weight`, `dpo_label_smoothing`, `simpo_gamma`,
`ld_alpha` of the policy alone) stay its own code. `logits/*` are means over scored tokens instead
of all tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.options import FusedOptions
from . import own_loss, shapes
from .patching import Undo

__all__ = ["patch_llamafactory", "unpatch_llamafactory"]

# Its names of the losses of mean log-probs.
_OF_MEANS = {"ipo", "orpo", "simpo"}


def patch_llamafactory(
    fused: FusedOptions | dict[str, Any] | None = None,
    *,
    allow_untested: bool = False,
    on_bypass: str = "raise",
    **options: Any,
) -> Undo:
    """Exchange the forward of LLaMA-Factory's DPO trainer, for the whole process.

    Arguments and return value as `patch_trl`; `loss_options` are refused, its own are followed.
    """
    return _framework.patch(fused, allow_untested, on_bypass, options)


def unpatch_llamafactory() -> None:
    """Undo `patch_llamafactory`, where it is still ours."""
    _framework.unpatch()


def _refuse(trainer: Any) -> None:
    own_loss.refuse(trainer, {"an encoder-decoder model": trainer.is_encoder_decoder})


def _reference_logps(
    trainer: Any, model: Any, batch: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    if not trainer.finetuning_args.use_ref_model:
        return None
    return trainer.compute_reference_log_probs(model, batch)


def _concatenated_forward(original: Callable) -> Callable:
    @functools.wraps(original)
    def concatenated_forward(
        self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        labels = batch["labels"]
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        rows = own_loss.row_scores(self, model, inputs, labels, is_ref_model)
        # It counts places from a row's first scored token, the unscored ones behind it too.
        place = torch.arange(rows.scored.shape[1], device=rows.scored.device)
        position = place - rows.scored.int().argmax(1, keepdim=True)
        logps = own_loss.weighted_sums(rows, position, None if is_ref_model else self.ld_alpha)
        average = logps / rows.counts
        if self.loss_type in _OF_MEANS:
            logps = average
        chosen, rejected = logps.chunk(2)
        logits = _mean_logits(rows)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": logits[0],
            "rejected_logits": logits[1],
            "chosen_logps_avg": average.chunk(2)[0],
        }

    return concatenated_forward


def _mean_logits(rows: own_loss.RowScores) -> Tensor:
    """[2] means over the scored tokens of chosen and rejected; 0 where they were not asked for."""
    if rows.mean_logits is None:
        return rows.logps.new_zeros(2)
    sums = torch.stack([x.sum() for x in rows.mean_logits.detach().chunk(2)])
    return sums / torch.stack([x.sum() for x in rows.scored.chunk(2)])


overrides = functools.partial(own_loss.overrides, _concatenated_forward, _refuse, _reference_logps)
_framework = own_loss.Framework(shapes.OF_LLAMAFACTORY, overrides)
target_of = _framework.target_of
