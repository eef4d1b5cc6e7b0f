"""Overrides of TRL's OnlineDPOTrainer: log-probs of sampled completions without their softmax."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...models.attached import attach_head
from ...models.forward import scored_tokens
from ...models.layouts import known
from ...models.structure import base_model_of, deterministic
from .. import hf_trainer
from ..announce import announce
from ..first_step import watch_first_step

STAYS_PADDED = (
    "OnlineDPOTrainer's objective/entropy, objective/kl and what it makes of them count what "
    "stands behind an EOS, which a packed row does not run; layout='shared' by name runs the "
    "sampled tokens alone, with the same loss"
)
_VISION = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")


def trainer_class() -> type | None:
    """TRL's OnlineDPOTrainer; None where it cannot be imported (it needs more than DPOTrainer)."""
    for module in ("trl.experimental.online_dpo", "trl.trainer.online_dpo_trainer"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is experimental: no one asked for it yet
                return importlib.import_module(module).OnlineDPOTrainer
        except (ImportError, RuntimeError, AttributeError):  # moved, or without its requirements
            continue
    return None


def overrides() -> dict[str, Callable[[Any], Any]]:
    return {"__init__": _init, "_forward": _forward}


def _init(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        fused = type(self).fused_default
        auto = fused.layout == "auto"
        if auto:
            fused = replace(fused, layout="padded", share_prefix=None)
        if fused.ref_adapter_name is not None:
            raise ValueError("ref_adapter_name: OnlineDPOTrainer has a reference of its own")
        if fused.reference_cache is not None:
            warnings.warn(
                "reference_cache: not used by OnlineDPOTrainer (its completions are new each step)",
                stacklevel=2,
            )
        self.fused = fused
        self._dpo_announced = False
        original(self, *args, **kwargs)
        if auto:
            known(base_model_of(self.model)).tell(f"layout: padded rows, because {STAYS_PADDED}")
        watch_first_step(self)

    return __init__


def _forward(original: Callable) -> Callable:
    @functools.wraps(original)
    def forward(
        self: Any,
        model: Any,
        prompt_ids: Tensor,  # [R, P]
        prompt_mask: Tensor,
        completion_ids: Tensor,  # [R, C]
        completion_mask: Tensor,
        vision_inputs: dict[str, Any] | None = None,
    ) -> Tensor:  # [R, C], padding included, as TRL's
        if not prompt_ids.shape[1]:
            given = () if vision_inputs is None else (vision_inputs,)
            return original(
                self, model, prompt_ids, prompt_mask, completion_ids, completion_mask, *given
            )
        if vision_inputs is None:  # from the left, but images keep their tokens
            cut = max(prompt_ids.size(1) + completion_ids.size(1) - self.max_length, 0)
            prompt_ids, prompt_mask = prompt_ids[:, cut:], prompt_mask[:, cut:]
        ids = torch.cat([prompt_ids, completion_ids], 1)
        mask = torch.cat([prompt_mask, completion_mask], 1)
        labels = torch.cat([torch.full_like(prompt_ids, -100), completion_ids], 1)
        images = {k: vision_inputs[k] for k in _VISION if vision_inputs and k in vision_inputs}
        attach_head(self.accelerator.unwrap_model(model))
        # Without gradient it is the reference's turn.
        mode = nullcontext() if torch.is_grad_enabled() else deterministic(model)
        with self.accelerator.autocast(), mode:
            inputs = {"input_ids": ids, "attention_mask": mask, **images}
            logps = scored_tokens(model, inputs, labels, self.fused).logps
        assert logps is not None
        if torch.is_grad_enabled() and not self._dpo_announced:
            self._dpo_announced = True
            announce(self, hf_trainer.model_dtype(self), None)
        return logps[:, -completion_ids.shape[1] :]

    return forward
