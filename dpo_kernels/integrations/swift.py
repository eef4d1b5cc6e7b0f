"""ms-swift's DPO trainer with the fused head.

    from dpo_kernels.integrations.swift import patch_swift
    patch_swift()                       # before its trainer is built; unpatch_swift() undoes

or, without a line of Python: `dpo-kernels run -- swift rlhf --rlhf_type dpo ...`.

Its trainer has a forward, a loss and metrics of its own; the forward, which makes the logits, is
exchanged, below whatever accelerate wraps the models in. Its losses and their options (`loss_type`
and `loss_weights`, `beta`, `label_smoothing`, `rpo_alpha`, `ld_alpha` of the policy alone,
`f_divergence_type`, `discopop_tau`, `reference_free`) stay its own code. Refused by name: packing,
padding_free, sequence parallelism, templates of multimodal models, encoder-decoders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..models.options import FusedOptions
from . import own_loss, shapes
from .patching import Undo

__all__ = ["patch_swift", "unpatch_swift"]

# What its batches hold that is no input of the model.
_NOT_FOR_THE_MODEL = {"labels", "text_position_ids", "ref_chosen_logps", "ref_rejected_logps"}
# Losses of its own that take means over tokens, not sums.
_OF_MEANS = {"ipo"}


def patch_swift(
    fused: FusedOptions | dict[str, Any] | None = None,
    *,
    allow_untested: bool = False,
    on_bypass: str = "raise",
    **options: Any,
) -> Undo:
    """Exchange the forward of ms-swift's DPO trainer, for the whole process.

    Arguments and return value as `patch_trl`; `loss_options` are refused, its own are followed.
    """
    return _framework.patch(fused, allow_untested, on_bypass, options)


def unpatch_swift() -> None:
    """Undo `patch_swift`, where it is still ours."""
    _framework.unpatch()


def _refuse(trainer: Any) -> None:
    template = trainer.template
    multimodal = getattr(trainer.model_meta, "is_multimodal", False)
    losses = trainer.loss_type if isinstance(trainer.loss_type, list) else [trainer.loss_type]
    own_loss.refuse(
        trainer,
        {
            "packing=true": bool(getattr(template, "packing", False)),
            "padding_free=true": bool(template.padding_free),
            f"sequence_parallel_size={template.sequence_parallel_size}": (
                template.sequence_parallel_size > 1
            ),
            "a multimodal model (its template's hook on the forward drops what it does not know)": (
                bool(multimodal)
            ),
            "an encoder-decoder model": trainer.is_encoder_decoder,
            "loss_type=ipo (before 4.5.3 ms-swift takes its means in the forward)": (
                not _OF_MEANS.isdisjoint(losses) and not hasattr(trainer, "_get_ipo_sequence_logps")
            ),
        },
    )


def _reference_logps(
    trainer: Any, model: Any, batch: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    if trainer.reference_free:
        return None
    return trainer.compute_ref_log_probs(batch)


def _concatenated_forward(original: Callable) -> Callable:
    @functools.wraps(original)
    def concatenated_forward(
        self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        labels = batch["labels"]
        inputs = {k: v for k, v in batch.items() if k not in _NOT_FOR_THE_MODEL}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        rows = own_loss.row_scores(self, model, inputs, labels, is_ref_model)
        position = rows.scored.cumsum(1) - 1
        logps = own_loss.weighted_sums(rows, position, None if is_ref_model else self.args.ld_alpha)
        logits = rows.mean_logits
        logits = rows.logps.new_zeros(rows.logps.shape) if logits is None else logits.detach()
        result = {}
        for i, name in enumerate(("chosen", "rejected")):
            scored = rows.scored.chunk(2)[i]
            result[f"{name}_logps"] = logps.chunk(2)[i]
            result[f"{name}_completion_token_counts"] = rows.counts.chunk(2)[i]
            result[f"mean_{name}_logits"] = logits.chunk(2)[i].sum() / scored.sum()
        if not is_ref_model:
            chosen, scored = rows.logps.chunk(2)[0], rows.scored.chunk(2)[0]
            result["nll_loss"] = -chosen.sum() / scored.sum()
        if self.aux_loss_enabled:
            assert rows.aux_loss is not None
            result["aux_loss"] = rows.aux_loss
        return result

    return concatenated_forward


overrides = functools.partial(own_loss.overrides, _concatenated_forward, _refuse, _reference_logps)
_framework = own_loss.Framework(shapes.OF_SWIFT, overrides)
target_of = _framework.target_of
