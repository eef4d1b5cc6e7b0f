"""One DPO step over any wrapped causal LM: reference log-probs, then loss and metrics.

    ref = reference_logps(model_or_ref, inputs, labels, ...)      # no gradient
    out = pair_step(model, inputs, labels, ref, loss_options, fused)

`model` is what the framework trains, wrapped or not; the head was attached below it.

Letters: `B` pairs, `T` positions, `H` hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import dpo_kernels as dk

from ..causal_lm import deterministic, router_loss_weight, text_config
from .head import HeadCall, HeadOutput, base_model_of
from .options import HEAD_STATS, FusedOptions


def labels_of(input_ids: Tensor, completion_mask: Tensor, ignore_index: int = -100) -> Tensor:
    """[2B, T] the ids where the completion is, `ignore_index` elsewhere."""
    return input_ids.masked_fill(completion_mask == 0, ignore_index)


def pair_step(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    ref_logps: Tensor | None,
    loss_options: dict[str, Any],
    fused: FusedOptions,
    router_weight: float | None = None,
) -> HeadOutput:
    """Loss of a batch [chosen; rejected] through `model`, with log-probs, rewards, statistics.

    `inputs` are the model's own; `labels` [2B, T]; `ref_logps` [2B] (LD-weighted if `ld_alpha`),
    [2B, T - 1] per token, or None where the loss has no reference. `router_weight`: of a mixture of
    experts' load-balancing loss, which is added; None: as the model's configuration has it.
    """
    function = functools.partial(
        _loss, labels=labels, ref_logps=ref_logps, options=loss_options, fused=fused
    )
    if router_weight is None:
        router_weight = router_loss_weight(base_model_of(model))
    call = HeadCall(function, labels.shape[1], fused.share_prefix)
    out = run_head(model, inputs, call, bool(router_weight))
    if out.loss is None:
        raise RuntimeError(f"{type(model).__name__} answered without a loss: a wrapper dropped it")
    if router_weight:
        assert out.aux_loss is not None
        out.loss = out.loss + router_weight * out.aux_loss
    return out


def run_head(
    model: nn.Module, inputs: Mapping[str, Any], call: HeadCall, router: bool = False
) -> HeadOutput:
    """`model(**inputs)` with the head, whose answer must have come.

    `router`: whether the load-balancing loss of a mixture of experts is wanted.
    """
    base = base_model_of(model)
    if hasattr(text_config(base.config), "output_router_logits"):
        inputs = {**inputs, "output_router_logits": router}
    out = model(**inputs, dpo_head=call)
    if getattr(out, "loss", None) is None and getattr(out, "logps", None) is None:
        raise RuntimeError(
            f"{type(base).__name__} answered without a loss: no head was attached to it, or its "
            "forward was replaced since by one that drops dpo_head. Call attach(model) after "
            "whatever replaces the forward, before DDP, FSDP or Accelerator.prepare"
        )
    return out


def scored_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    fused: FusedOptions,
    stats: tuple[str, ...] = (),
) -> HeadOutput:
    """`logps` [2B, T - 1] of the scored tokens and the statistics asked for."""
    function = functools.partial(_tokens, labels=labels, fused=fused, stats=stats)
    call = HeadCall(function, labels.shape[1], fused.share_prefix)
    return run_head(model, inputs, call)


@torch.no_grad()
def pair_logps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    fused: FusedOptions,
    ld_alpha: float | None = None,
) -> Tensor:
    """[2, B] log-probs of chosen and rejected, LD-weighted if asked for, without gradient."""
    options = {"reference_free": True, "ld_alpha": ld_alpha, "beta": 1.0}
    plain = FusedOptions(
        share_prefix=fused.share_prefix, head_stats=False, backend=fused.backend,
        memory_budget=fused.memory_budget,
    )  # fmt: skip
    out = pair_step(model, inputs, labels, None, options, plain, 0.0)
    assert out.pair_logps is not None
    return out.pair_logps


@torch.no_grad()
def noiseless(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    out: HeadOutput,
    loss_options: dict[str, Any],
    fused: FusedOptions,
) -> HeadOutput:
    """The step that gave `out` again, against the same reference, without the model's noise.

    What the step-0 check looks at: with dropout, NEFTune, jitter or layerdrop a policy in training
    is not its reference. The router's loss, which is 0 at no log-ratio, is left out too.
    """
    assert out.pair_logps is not None and out.rewards is not None
    beta = torch.as_tensor(loss_options.get("beta", 0.1)).to(out.rewards)
    ref = (out.pair_logps - out.rewards / beta).flatten()
    options = {**loss_options, "beta_dpo_state": None}
    fused = replace(fused, head_stats=False)
    # DDP must not run between the forward of a step and its backward.
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    with deterministic(model):
        return pair_step(model, inputs, labels, ref, options, fused, 0.0)


def _arguments(head: dict[str, Any], fused: FusedOptions) -> dict[str, Any]:
    return {**head, "backend": fused.backend, "memory_budget": fused.memory_budget}


def _tokens(
    hidden: Tensor, head: dict[str, Any], labels: Tensor, fused: FusedOptions, stats: tuple
) -> HeadOutput:
    labels = labels.to(hidden.device)  # the head may be on another (device_map)
    out = dk.linear_sequence_logps(
        hidden, labels=labels, reduction="none", stats=stats, **_arguments(head, fused)
    )
    logps, values = out if stats else (out, {})
    return HeadOutput(logps=logps, **values)


def _loss(
    hidden: Tensor,
    head: dict[str, Any],
    labels: Tensor,
    ref_logps: Tensor | None,
    options: dict[str, Any],
    fused: FusedOptions,
) -> HeadOutput:
    by_token = options.get("ld_alpha") is not None or options.get("use_weighting", False)
    labels = labels.to(hidden.device)
    ref_logps = None if ref_logps is None else ref_logps.to(hidden.device)
    options = {k: v.to(hidden.device) if isinstance(v, Tensor) and k != "beta_dpo_state" else v
               for k, v in options.items()}  # fmt: skip
    # Statistics come with the log-probs of one pass over the head; a loss over tokens has its own.
    if by_token or not fused.head_stats:
        out = dk.fused_linear_dpo_loss(
            hidden, labels=labels, ref_logps=ref_logps, **_arguments(head, fused), **options
        )
        result = HeadOutput()
        if fused.head_stats:
            with torch.no_grad():
                result = _tokens(hidden.detach(), head, labels, fused, HEAD_STATS)
    else:
        result = _tokens(hidden, head, labels, fused, HEAD_STATS)
        assert result.logps is not None
        out = _from_tokens(result.logps, labels, ref_logps, options)
    # Made anew: a field set later is no key, and wrappers that rebuild outputs by key drop it.
    return replace(
        result,
        loss=out.loss,
        logps=None if result.logps is None else result.logps.detach(),
        pair_logps=torch.stack([out.chosen_logps, out.rejected_logps]),
        rewards=torch.stack([out.chosen_rewards, out.rejected_rewards]),
    )


def _from_tokens(
    logps: Tensor, labels: Tensor, ref_logps: Tensor | None, options: dict[str, Any]
) -> dk.DPOOutput:
    """The loss over log-probs [2B, T - 1], summed in fp64 as the fused loss does."""
    lengths = (labels[:, 1:] != -100).sum(1).chunk(2)
    sums = logps.double().sum(1).chunk(2)
    reference: tuple[Tensor | None, ...] = (None, None)
    if ref_logps is not None:
        ref = ref_logps.double()
        reference = (ref.sum(1) if ref.dim() == 2 else ref).chunk(2)
    out = dk.preference_loss(
        *sums, *reference, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options
    )
    return dk.DPOOutput(*(x.to(logps.dtype) for x in out))
