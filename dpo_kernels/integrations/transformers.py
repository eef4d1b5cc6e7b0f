"""transformers' own Trainer as a DPO trainer.

    trainer = FusedDPOTrainer(
        model=model, ref_model=reference, args=TrainingArguments(...),
        train_dataset=examples,                  # rows with prompt_ids, chosen_ids, rejected_ids
        data_collator=PreferenceCollator(tokenizer.pad_token_id),
        loss_options={"beta": 0.1, "loss_type": "sigmoid"},
    )

or `class Mine(FusedDPOMixin, MyTrainer)` over a Trainer of one's own. The reference is `ref_model`,
the batch's `ref_logps`, or below PEFT the adapter called `ref` or no adapter at all; always in eval
mode. Metrics have TRL's names; they are reduced over ranks once a logging step, and those of an
evaluation are means over its pairs, whatever batches they came in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..models.attached import attach_head
from ..models.forward import Reference
from ..models.options import FusedOptions
from ..models.references import needs_reference
from ..models.step0 import WrongReference
from .cached_reference import cache_of
from .first_step import check_first_loss, check_first_rows, note_loss, watch_first_step
from .frameworks import check_version
from .hf_trainer import (
    check_head_of,
    load_state,
    loss_state,
    note_sizes,
    save_state,
    share_of_step,
)
from .plain import PreferenceCollator, check_reference, find_reference, step_of
from .trainer_metrics import (
    ONE_BY_ONE,
    PackedMetrics,
    evaluation_metrics,
    loss_sums,
    mean_loss,
    real_pairs,
)

__all__ = [
    "FusedDPOMixin",
    "FusedDPOTrainer",
    "FusedOptions",
    "PreferenceCollator",
    "WrongReference",
]


class FusedDPOMixin:
    """Loss, evaluation and metrics of DPO for a `transformers.Trainer`, in front of it in the MRO.

    Args besides the Trainer's:
        ref_model: the reference, or None: precomputed, PEFT's, or a loss without one.
        loss_options: `dpo_kernels.losses.LossOptions` as a dict.
        fused: `FusedOptions` or its fields as a dict.
    """

    def __init__(
        self,
        *args: Any,
        ref_model: Any = None,
        loss_options: dict[str, Any] | None = None,
        fused: FusedOptions | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_version("transformers")
        self.fused = FusedOptions.of(fused, FusedOptions())
        self.loss_options = {**(loss_options or {}), **self.fused.loss_options}
        needs_reference(self.loss_options)  # names the nearest loss where there is none
        self._packed = {"train": PackedMetrics(), "eval": PackedMetrics()}
        self._tokens = 0
        self._reference_seen = False
        self._beta_dpo_state = torch.zeros(2, dtype=torch.float64)
        super().__init__(*args, **kwargs)
        self.model: Any
        self.args: Any
        self.accelerator: Any
        self._refuse()
        # The dataset has columns that are no inputs of the model, and the loss is scaled here.
        self.args.remove_unused_columns = False
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        self.ref_model = ref_model
        if ref_model is not None:
            attach_head(ref_model.requires_grad_(False))
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
            self.ref_model.eval()
        attach_head(self.model)
        watch_first_step(self)

    def _refuse(self) -> None:
        """What a Trainer takes and this one could only leave out."""
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name, None) is not None:
                raise ValueError(
                    f"{name} works on the model's logits, which are never made here; the metrics "
                    "that are logged are rewards, logps, logits and mean_token_accuracy"
                )
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("compute_loss_func: the loss is chosen by loss_options here")
        if self.args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor smooths a cross-entropy; for conservative DPO give "
                "loss_options={'label_smoothing': ...}"
            )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's batches of a step, whose sizes the loss must know."""
        found = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        note_sizes(self, found[0])
        return found

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        mode = "train" if self.model.training else "eval"
        options = dict(self.loss_options)
        if mode == "train":
            options |= share_of_step(self)
        attach_head(self.accelerator.unwrap_model(self.model))  # model_init makes a new one
        if mode == "eval":
            options |= ONE_BY_ONE
        options = loss_state(self, options)
        first = mode == "train" and not self._reference_seen
        if first:
            check_first_rows(self, inputs["labels"])
            check_head_of(self)
        ref = self._reference(inputs) if needs_reference(options) else None
        out = step_of(model, inputs, ref_logps=ref, fused=self.fused, **options)
        if first and out.loss is not None:
            check_first_loss(self, out.loss)
        if mode == "train" and out.loss is not None:
            note_loss(self, out.loss, inputs["input_ids"])
        started = self.state.global_step  # type: ignore[attr-defined]
        if first and ref is not None and self.fused.check_reference and not started:
            opt_out = "FusedDPOTrainer(..., fused={'check_reference': False})"
            # What is logged of the first step is the policy as it was checked: rewards of 0.
            seen = check_reference(
                model, out, inputs, ref_logps=ref, opt_out=opt_out, fused=self.fused, **options
            )
            out.rewards, out.pair_logps = seen.rewards, seen.pair_logps
        self._reference_seen |= mode == "train"
        mask = inputs.get("attention_mask")
        tokens = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        assert out.loss is not None
        real = None if mode == "train" else real_pairs(self, len(out.loss))
        beta = None if ref is None else inputs.get("beta", options.get("beta", 0.1))
        self._packed[mode].add(out, inputs["labels"], tokens, real, beta)
        if mode == "eval":
            out.loss = mean_loss(loss_sums(out, inputs["labels"], real or len(out.loss)))
        return (out.loss, out) if return_outputs else out.loss

    def _reference(self, inputs: dict[str, Any]) -> Reference:
        policy = self.accelerator.unwrap_model(self.model)
        free = "loss_options={'reference_free': True}"
        return find_reference(
            inputs,
            policy,
            self.ref_model,
            self.fused,
            self.loss_options,
            free,
            cache_of(self),
            self.accelerator.autocast,
        )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """The loss alone: there are no logits to hand on."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, for `evaluate` and `predict`, with our metrics under the same prefix."""
        self._refuse()  # compute_metrics may have been set since
        self._packed["eval"] = PackedMetrics()
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        values = {**evaluation_metrics(self), "num_tokens": self._tokens}
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in values.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training:
            values, tokens = self._packed["train"].take(
                self.accelerator.device, lambda x: self.accelerator.reduce(x, "sum")
            )
            if values:
                self._tokens += tokens
                logs |= {**values, "num_tokens": self._tokens}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str, *args: Any) -> None:
        super()._save_optimizer_and_scheduler(output_dir, *args)  # type: ignore[misc]
        save_state(self, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None, *args: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint, *args)  # type: ignore[misc]
        load_state(self, checkpoint)


class FusedDPOTrainer(FusedDPOMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` for preference pairs; see the module."""
