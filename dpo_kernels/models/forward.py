"""One DPO step over any wrapped causal LM: reference log-probs, then loss and metrics.

    ref = scored_tokens(reference, inputs, labels, fused).logps       # no gradient
    out = pair_step(model, inputs, labels, ref, loss_options, fused)

`model` is what a framework trains, wrapped or not; the head was attached below it.

Letters: `B` pairs, `T` positions, `H` hidden size, `N` scored tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import dpo_kernels as dk

from ..data import ScoredBatch
from .attached import HeadCall, HeadOutput, run_head
from .experts import router_loss_weight
from .options import HEAD_STATS, FusedOptions
from .structure import base_model_of, deterministic


def labels_of(input_ids: Tensor, completion_mask: Tensor, ignore_index: int = -100) -> Tensor:
    """[2B, T] the ids where the completion is, `ignore_index` elsewhere."""
    return input_ids.masked_fill(completion_mask == 0, ignore_index)


def predicted(labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The labels [2B, T] without those that padding on the left predicts.

    A row's first token is predicted by nothing, on whichever side the row is padded: a state of
    padding is a number of no meaning, and layouts without padding have none. Labels on another
    device than the mask stay as they are, since the host would wait; layouts refuse those.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != labels.shape or mask.device != labels.device:
        return labels
    before = mask.bool().cumsum(-1) == 0  # the row's first token
    return labels.masked_fill(torch.nn.functional.pad(before[:, :-1], (1, 0)), -100)


@dataclass(frozen=True)
class ReferenceStates:
    """What a reference gives to losses of whole distributions: its states and its whole head."""

    hidden: Tensor  # [2B, T, H']
    head: dict[str, Any]  # weight, bias, lora (None), scales

    def arguments(self, head: dict[str, Any]) -> dict[str, Any]:
        """As the linear functions take them, beside the policy's `head`."""
        scales = [{k: v for k, v in x.items() if k.startswith("logit_")} for x in (self.head, head)]
        if scales[0] != scales[1]:
            raise ValueError(
                f"the reference scales its logits by {scales[0]}, the policy by {scales[1]}: a "
                "loss of whole distributions needs the same"
            )
        device = head["weight"].device
        bias = self.head["bias"]
        return {
            "ref_hidden": self.hidden.to(device),
            "ref_weight": self.head["weight"].to(device),
            "ref_bias": None if bias is None else bias.to(device),
        }


Reference = Tensor | ReferenceStates


@dataclass(frozen=True)
class PairTask:
    """What the head is to make of the states of a batch [chosen; rejected].

    `reference`: log-probs [2B] (LD-weighted if `ld_alpha`) or per token, states, or None where the
    loss has none. With `batch` labels are packed, and `per_token` says what log-probs [N] are.
    """

    labels: Tensor  # [2B, T], or the batch's [N]
    reference: Reference | None
    options: dict[str, Any]
    fused: FusedOptions
    batch: ScoredBatch | None = None
    per_token: bool | None = None
    function: Callable[..., dk.DPOOutput] = dk.fused_linear_dpo_loss

    def loss(self, hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
        """Loss, log-probs, rewards and statistics, of [2B, T, H] or [N, H] states."""
        out = self._fused(hidden, head, self.reference, self.per_token)
        # Fields given here: one set later is no key, and wrappers that rebuild outputs drop it.
        return HeadOutput(
            loss=out.loss,
            pair_logps=torch.stack([out.chosen_logps, out.rejected_logps]),
            rewards=torch.stack([out.chosen_rewards, out.rejected_rewards]),
            sft=out.sft,
            strategy=out.strategy,
            **out.stats,
        )

    def first_loss(self, hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
        """`loss`, and what it is with the policy for its own reference."""
        out = self.loss(hidden, head)
        own: Reference | None = None
        if isinstance(self.reference, ReferenceStates):
            if head["lora"] is not None:  # a reference's head has no adapter
                return out
            own = ReferenceStates(hidden.detach(), head)
        elif self.reference is not None:
            own = score_tokens(hidden, head, self.labels, self.fused, batch=self.batch).logps
        zero = self._fused(hidden, head, own, None if self.batch is None else True)
        return replace(out, zero_loss=zero.loss)

    def _fused(
        self,
        hidden: Tensor,
        head: dict[str, Any],
        reference: Reference | None,
        per_token: bool | None,
    ) -> dk.DPOOutput:
        device = hidden.device  # the head may be on another than the labels (device_map)
        options = {
            k: v.to(device) if isinstance(v, Tensor) and k != "beta_dpo_state" else v
            for k, v in self.options.items()
        }
        against: dict[str, Any] = {}
        if isinstance(reference, ReferenceStates):
            against = reference.arguments(head)
        elif reference is not None:
            against = {"ref_logps": reference.to(device), "ref_logps_per_token": per_token}
        return self.function(
            hidden,
            stats=HEAD_STATS if self.fused.head_stats else (),
            **against,
            **_scored(self.labels, self.batch, device),
            **_arguments(head, self.fused),
            **options,
        )


class RankedTask(PairTask):
    """The same of lists of K completions (`num_completions` in the options), with sums alone."""

    def first_loss(self, hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
        out = self.loss(hidden, head)
        own = None if self.reference is None else self._sums(hidden, head).detach()
        return replace(out, zero_loss=self._fused(hidden, head, own, False).loss)

    def _sums(self, hidden: Tensor, head: dict[str, Any]) -> Tensor:
        """[sequences] log-probs."""
        found = score_tokens(
            hidden, head, self.labels, self.fused, batch=self.batch, reduction="sum"
        )
        assert found.logps is not None
        return found.logps


class UnpairedTask(RankedTask):
    """The same of single completions: options of `unpaired_loss`."""

    def loss(self, hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
        assert not isinstance(self.reference, ReferenceStates)
        return self._of(self._sums(hidden, head), self.reference)

    def first_loss(self, hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
        assert not isinstance(self.reference, ReferenceStates)
        logps = self._sums(hidden, head)
        out = self._of(logps, self.reference)
        if self.reference is None:
            return replace(out, zero_loss=out.loss)
        return replace(out, zero_loss=self._of(logps, logps.detach()).loss)

    def _of(self, logps: Tensor, reference: Tensor | None) -> HeadOutput:
        options: dict[str, Any] = {
            k: v.to(logps.device) if isinstance(v, Tensor) else v for k, v in self.options.items()
        }
        if reference is not None:
            reference = reference.to(logps.device)
        desirable = options["desirable"]
        out = dk.unpaired_loss(logps, reference, **options)
        return HeadOutput(
            loss=out.loss, logps=out.logps, rewards=out.rewards, desirable=desirable, kl=out.kl
        )


def score_tokens(
    hidden: Tensor,
    head: dict[str, Any],
    labels: Tensor,
    fused: FusedOptions,
    stats: tuple[str, ...] = (),
    batch: ScoredBatch | None = None,
    reduction: str = "none",
) -> HeadOutput:
    """Log-probs of the scored tokens, and statistics."""
    out = dk.linear_sequence_logps(
        hidden,
        reduction=reduction,
        stats=stats,
        **_scored(labels, batch, hidden.device),
        **_arguments(head, fused),
    )
    logps, values = out if stats else (out, {})
    return HeadOutput(logps=logps, **values)


def _scored(labels: Tensor, batch: ScoredBatch | None, device: torch.device) -> dict[str, Any]:
    """The labels as the linear functions take them; those on the host stay there."""
    if batch is not None:
        lengths = batch.scored_lengths
        packed = {"cu_seqlens": batch.cu_seqlens, "scored_lengths": lengths, "shift": False}
        return {"labels": batch.labels, **packed}
    return {"labels": labels if labels.device.type == "cpu" else labels.to(device)}


def _arguments(head: dict[str, Any], fused: FusedOptions) -> dict[str, Any]:
    return {**head, "backend": fused.backend, "memory_budget": fused.memory_budget}


def head_call(
    function: Callable[..., HeadOutput],
    labels: Tensor,
    fused: FusedOptions,
    batch: ScoredBatch | None = None,
) -> HeadCall:
    """`HeadCall` as the options have it; a batch of ours is laid out already."""
    layout, check = fused.layout or "auto", fused.check_layout
    if batch is not None:
        return HeadCall(function, 0, layout, batch, check)
    return HeadCall(function, labels.shape[1], layout, None, check, labels)


def run_pairs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    task: PairTask,
    router_weight: float | None = None,
    first: bool = False,
) -> HeadOutput:
    """The task's loss of a batch through `model`.

    `inputs` are the model's own, none beside a batch of ours. `router_weight`: of a mixture of
    experts' load-balancing loss, which is added; None: as the model's configuration has it.
    `first`: with the loss at zero log-ratios.
    """
    if router_weight is None:
        router_weight = router_loss_weight(base_model_of(model))
    function = task.first_loss if first else task.loss
    call = head_call(function, task.labels, task.fused, task.batch)
    out = run_head(model, inputs, call, bool(router_weight))
    if out.loss is None:
        raise RuntimeError(f"{type(model).__name__} answered without a loss: a wrapper dropped it")
    if router_weight:
        assert out.aux_loss is not None
        out.loss = out.loss + router_weight * out.aux_loss
    return out


def pair_step(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    reference: Reference | None,
    loss_options: dict[str, Any],
    fused: FusedOptions,
    router_weight: float | None = None,
) -> HeadOutput:
    """Loss of a batch [chosen; rejected] through `model`, with log-probs, rewards, statistics."""
    task = PairTask(predicted(labels, inputs), reference, loss_options, fused)
    return run_pairs(model, inputs, task, router_weight)


def scored_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    fused: FusedOptions,
    stats: tuple[str, ...] = (),
) -> HeadOutput:
    """`logps` [2B, T - 1] of the scored tokens and the statistics asked for."""
    labels = predicted(labels, inputs)
    function = functools.partial(score_tokens, labels=labels, fused=fused, stats=stats)
    return run_head(model, inputs, head_call(function, labels, fused))


@torch.no_grad()
def reference_states(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, fused: FusedOptions
) -> ReferenceStates:
    """What `model` gives as the reference of a loss of whole distributions."""
    parameters = base_model_of(model).get_output_embeddings().parameters()
    if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in parameters):
        raise ValueError(
            "the reference's head is in shards (FSDP2, ZeRO-3), and a loss of whole distributions "
            "needs all of it beside the policy's; keep the reference whole"
        )
    kept: list[ReferenceStates] = []

    def keep(hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
        if head["lora"] is not None:
            raise ValueError(
                "the reference has an adapter on its head, which losses of whole distributions do "
                "not take; merge it"
            )
        kept.append(ReferenceStates(hidden, head))
        return HeadOutput(logps=hidden)

    run_head(model, inputs, head_call(keep, predicted(labels, inputs), fused))
    return kept[0]


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
    plain = replace(fused, head_stats=False, loss_options={})
    out = pair_step(model, inputs, labels, None, options, plain, 0.0)
    assert out.pair_logps is not None
    return out.pair_logps


def completion_sums(logps: Tensor, labels: Tensor, ld_alpha: float | None) -> Tensor:
    """[2B] sums of `logps` [2B, T - 1] over the scored tokens of `labels` [2B, T].

    With `ld_alpha` what a completion has beyond the shorter one of its pair weighs that.
    """
    scored = (labels[:, 1:] != -100).to(logps.device)
    logps = logps.double() * scored
    if ld_alpha is not None:
        counts = scored.sum(1)
        shared = torch.minimum(*counts.chunk(2)).repeat(2)[:, None]
        logps = torch.where(scored.cumsum(1) <= shared, logps, ld_alpha * logps)
    return logps.sum(1)


@torch.no_grad()
def noiseless(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    out: HeadOutput,
    reference: Reference | None,
    loss_options: dict[str, Any],
    fused: FusedOptions,
) -> HeadOutput:
    """The step that gave `out` again, against the same reference, without the model's noise.

    `reference`: None to find its log-probs from the rewards of `out`.

    What the step-0 check looks at: with dropout, NEFTune, jitter or layerdrop a policy in training
    is not its reference. The router's loss, which is 0 at no log-ratio, is left out too.
    """
    assert out.pair_logps is not None and out.rewards is not None
    if reference is None:
        beta = torch.as_tensor(loss_options.get("beta", 0.1)).to(out.rewards)
        reference = (out.pair_logps - out.rewards / beta).flatten()
    options = {**loss_options, "beta_dpo_state": None}
    fused = replace(fused, head_stats=False)
    # DDP must not run between the forward of a step and its backward.
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    task = PairTask(predicted(labels, inputs), reference, options, fused)
    with deterministic(model):
        return run_pairs(model, inputs, task, 0.0, first=True)
