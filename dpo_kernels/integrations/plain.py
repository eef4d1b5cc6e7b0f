"""The head under any training loop: ten lines of plain torch, or a loss callable.

    attach(model)
    for batch in loader:                        # PreferenceCollator's, or anything with its keys
        ref = reference_logps(ref_model, batch)
        out = dpo_step(model, batch, ref_logps=ref, beta=0.1)
        out.loss.backward()
        optimizer.step(); optimizer.zero_grad()

A batch is [chosen; rejected]: `input_ids`, `attention_mask`, `labels` [2B, T] (-100 where nothing
is scored), optionally `ref_logps` [2B] and the columns `beta`, `weight`, `margin`,
`label_smoothing` [B]. The first step is watched: rows, gradients, and whether weights move.

For frameworks whose recipes call a loss object there are `PreferenceLoss` (torchtune's signature:
four log-probs in, losses and rewards out) and `LogitsLoss` (torchtitan's: predictions and labels).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import dpo_kernels as dk

from ..models import forward
from ..models.attached import HeadOutput, attach_head
from ..models.forward import Reference, ReferenceStates, pair_step, scored_tokens
from ..models.head_check import check_head
from ..models.options import FusedOptions
from ..models.references import needs_reference, needs_states, reference_adapter
from ..models.step0 import WrongReference, check_first_step
from ..models.structure import deterministic, unwrapped
from .cached_reference import OF_STATES, CachedReference, cache_of_model
from .rows import row_columns, take_row_options
from .watched import watch_of

__all__ = [
    "FusedOptions",
    "LogitsLoss",
    "PreferenceCollator",
    "PreferenceLoss",
    "WrongReference",
    "attach",
    "check_reference",
    "dpo_step",
    "reference_logps",
    "reference_states",
]

_NOT_FOR_THE_MODEL = {"labels", "ref_logps"}


class PreferenceCollator:
    """Examples of token ids to a batch [chosen; rejected], padded on the right.

    An example has `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ids), and may have
    `ref_chosen_logps`, `ref_rejected_logps` and the columns `beta`, `weight`, `margin`,
    `label_smoothing`. Sequences keep their first `max_length` tokens. A pair that has no signal
    then (a completion is empty, or both are equal) is left out with a warning; `ValueError` if none
    of the batch remains.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.max_length = max_length

    def _with_signal(self, examples: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        kept, reasons = [], []
        for i, example in enumerate(examples):
            room = None
            if self.max_length is not None:
                room = max(self.max_length - len(example["prompt_ids"]), 0)
            chosen, rejected = (list(example[f"{s}_ids"])[:room] for s in ("chosen", "rejected"))
            empty = [n for n, ids in (("chosen", chosen), ("rejected", rejected)) if not ids]
            reason = f"{empty[0]} is empty" if empty else "chosen and rejected are equal"
            if empty or chosen == rejected:
                start = list(example["prompt_ids"])[:8]
                reasons.append(f"example {i} of the batch (prompt_ids {start}...): {reason}")
            else:
                kept.append(example)
        if reasons:
            cut = f" after max_length={self.max_length}" if self.max_length is not None else ""
            text = f"pairs without signal{cut}: {'; '.join(reasons)}"
            if not kept:
                raise ValueError(f"{text}; none of the batch remains: take them out of the data")
            warnings.warn(f"left out {text}", stacklevel=3)
        return kept

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        examples = self._with_signal(examples)
        rows = [
            (list(e["prompt_ids"]), list(e[f"{side}_ids"]))
            for side in ("chosen", "rejected")
            for e in examples
        ]
        longest = max(len(p) + len(c) for p, c in rows)
        T = longest if self.max_length is None else min(longest, self.max_length)
        ids = torch.full((len(rows), T), self.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (prompt, completion) in enumerate(rows):
            row = torch.tensor((prompt + completion)[:T])
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
            labels[i, len(prompt) : len(row)] = row[len(prompt) :]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if "ref_chosen_logps" in examples[0]:
            batch["ref_logps"] = torch.tensor(
                [float(e[f"ref_{side}_logps"]) for side in ("chosen", "rejected") for e in examples]
            )
        return batch | row_columns(examples)


def attach(model: nn.Module, *, check: bool = True) -> None:
    """Prepare a causal LM of transformers for `dpo_step`, before it is wrapped.

    `check` compares our log-probs with the model's own logits on twelve tokens.
    """
    attach_head(model)
    if check:
        check_head(model)


def _split(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    rest, row_options = take_row_options(batch)
    inputs = {k: v for k, v in rest.items() if k not in _NOT_FOR_THE_MODEL}
    return inputs, row_options, batch["labels"]


def dpo_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    ref_logps: Reference | None = None,
    fused: FusedOptions | dict[str, Any] | None = None,
    **loss_options: Any,
) -> HeadOutput:
    """One forward: `loss` (scalar, differentiable), `pair_logps` and `rewards` [2, B], statistics.

    `ref_logps` [2B] or [2B, T - 1], or what `reference_states` gives, else the batch's own;
    `loss_options` those of `dpo_kernels.losses.LossOptions`. Raises `ValueError` as
    `fused_linear_dpo_loss`.
    """
    chosen = FusedOptions.of(fused, FusedOptions())
    watch = watch_of(model, chosen)
    if watch is not None:
        watch.rows(batch["labels"])
    out = step_of(model, batch, ref_logps=ref_logps, fused=chosen, **loss_options)
    if watch is not None:
        watch.forward(out)
        options = {**loss_options, **chosen.loss_options}
        if out.loss is not None and out.loss.requires_grad:
            beta = batch.get("beta", options.get("beta", 0.1))
            ids = batch.get("input_ids")
            watch.later.add(out, beta if needs_reference(options) else None, ids)
    return out


def step_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    ref_logps: Reference | None = None,
    fused: FusedOptions,
    **loss_options: Any,
) -> HeadOutput:
    """`dpo_step`, for trainers that watch the first step themselves."""
    inputs, row_options, labels = _split(batch)
    options = {**loss_options, **row_options}
    if ref_logps is None and not options.get("reference_free"):
        ref_logps = batch.get("ref_logps")
    return pair_step(model, inputs, labels, ref_logps, {**options, **fused.loss_options}, fused)


@contextmanager
def _reference(model: nn.Module, adapter: str | None) -> Iterator[nn.Module]:
    """`model`, ready to be asked: of a PEFT model the adapter of that name, if one is named."""
    attach_head(model)
    named = nullcontext() if adapter is None else reference_adapter(unwrapped(model), adapter)
    with torch.no_grad(), named, deterministic(model):
        yield model


def _score(model: nn.Module, batch: Mapping[str, Any], fused: FusedOptions) -> Tensor:
    inputs, _, labels = _split(batch)
    out = scored_tokens(model, inputs, labels, fused)
    assert out.logps is not None
    return out.logps


@torch.no_grad()
def reference_logps(
    model: nn.Module, batch: Mapping[str, Any], *, fused: FusedOptions | dict | None = None
) -> Tensor:
    """[2B, T - 1] log-probs of the scored tokens under a reference model, without gradient.

    The model is taken in eval mode, whatever mode it is in, and left as it was; of `fused`,
    `ref_adapter_name` chooses an adapter of it, and `reference_cache` keeps what it gives. It is
    looked at each time whether the model is another than it was.
    """
    chosen = FusedOptions.of(fused, FusedOptions())
    cache = cache_of_model(model, chosen.reference_cache)
    return _logps(cache, batch, lambda: _reference(model, chosen.ref_adapter_name), chosen)


def _logps(
    cache: CachedReference | None,
    batch: Mapping[str, Any],
    reference: Callable[[], AbstractContextManager[nn.Module]],
    fused: FusedOptions,
) -> Tensor:
    if cache is None:
        with reference() as model:
            return _score(model, batch, fused)
    inputs, _, labels = _split(batch)
    return cache.logps(inputs, labels, reference, lambda model: _score(model, batch, fused))


@torch.no_grad()
def reference_states(
    model: nn.Module, batch: Mapping[str, Any], *, fused: FusedOptions | dict | None = None
) -> ReferenceStates:
    """`reference_logps` for the losses that compare whole distributions (`tdpo1`, `tdpo2`)."""
    chosen = FusedOptions.of(fused, FusedOptions())
    cache = cache_of_model(model, chosen.reference_cache)
    return _states(cache, batch, lambda: _reference(model, chosen.ref_adapter_name), chosen)


def _states(
    cache: CachedReference | None,
    batch: Mapping[str, Any],
    reference: Callable[[], AbstractContextManager[nn.Module]],
    fused: FusedOptions,
) -> ReferenceStates:
    if cache is not None:
        cache.unused(OF_STATES)
    inputs, _, labels = _split(batch)
    with reference() as model:
        return forward.reference_states(model, inputs, labels, fused)


def find_reference(
    batch: Mapping[str, Any],
    policy: nn.Module,
    ref_model: nn.Module | None,
    fused: FusedOptions,
    loss_options: dict[str, Any],
    free: str,
    cache: CachedReference | None = None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Reference:
    """The batch's own reference log-probs, else `ref_model`'s, else those below PEFT's adapter.

    `free`: what to write to go without a reference. `cache`: what keeps them. `within`: the
    precision that the framework's forwards run in.
    """
    if "ref_logps" in batch:
        return batch["ref_logps"]
    if ref_model is not None and fused.ref_adapter_name is not None:
        raise ValueError(
            f"ref_adapter_name={fused.ref_adapter_name!r} is an adapter of the policy, and "
            "ref_model is another model: give one of them"
        )
    if ref_model is None and not hasattr(policy, "peft_config"):
        raise ValueError(
            f"no reference: give ref_model, ref_logps in the batch, a PEFT model, or {free}"
        )

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        with within():
            if ref_model is not None:
                with _reference(ref_model, None) as model:
                    yield model
                return
            with reference_adapter(policy, fused.ref_adapter_name), _reference(policy, None):
                yield policy

    ask: Any = _states if needs_states(loss_options) else _logps
    found: Reference = ask(cache, batch, reference, fused)
    return found


def check_reference(
    model: nn.Module,
    out: HeadOutput,
    batch: Mapping[str, Any],
    *,
    ref_logps: Reference | None = None,
    opt_out: str = "leave check_reference out",
    fused: FusedOptions | dict[str, Any] | None = None,
    **loss_options: Any,
) -> HeadOutput:
    """`WrongReference` unless `out`, of the first step, shows a policy equal to its reference.

    The model runs once more without its noise (dropout, NEFTune, jitter, ...); that step is
    returned. `ref_logps` as `dpo_step` had it; None: what `out` tells of it. `opt_out` ends the
    message: what to write where they differ on purpose.
    """
    inputs, row_options, labels = _split(batch)
    chosen = FusedOptions.of(fused, FusedOptions())
    loss_options = {**loss_options, **row_options, **chosen.loss_options}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if torch.is_autocast_enabled(labels.device.type):
        dtype = torch.get_autocast_dtype(labels.device.type)
    return check_first_step(
        model, inputs, labels, out, ref_logps, loss_options, chosen, dtype, opt_out
    )


class PreferenceLoss(nn.Module):
    """A loss object of torchtune's kind, over log-probs of sequences.

    `PreferenceLoss(**loss_options)(policy_chosen, policy_rejected, ref_chosen, ref_rejected)`
    gives (losses, chosen rewards, rejected rewards), each [B]; references may be left out for
    losses without one. Lengths go by keyword, for losses that need them.
    """

    def __init__(self, **loss_options: Any) -> None:
        super().__init__()
        self.options = {**loss_options, "reduction": "none"}

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = dk.preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **self.options,
        )
        return out.loss, out.chosen_rewards, out.rejected_rewards


class LogitsLoss(nn.Module):
    """A loss object of torchtitan's kind: `LogitsLoss(**options)(pred, labels, ref_logps=None)`.

    `pred` [2B, T, V] logits, `labels` [2B, T] already shifted (torchtitan's convention: position t
    scores labels[:, t]; `shift=True` for Hugging Face's), `ref_logps` [2B]. A scalar.
    """

    def __init__(self, *, shift: bool = False, **options: Any) -> None:
        super().__init__()
        self.function = dk.FusedDPOLoss(shift=shift, **options)

    def forward(self, pred: Tensor, labels: Tensor, ref_logps: Tensor | None = None) -> Tensor:
        return self.function(pred, labels, ref_logps=ref_logps).loss
