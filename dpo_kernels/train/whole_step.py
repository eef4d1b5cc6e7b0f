"""Losses that couple the pairs of a batch, over an optimizer step that runs in several batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import dpo_kernels as dk

from ..inputs.transfer import to_device
from ..models.attached import HeadOutput
from ..models.forward import ReferenceStates
from .config import DPOTrainConfig
from .reference import PairData
from .step_parts import Parts, Table, idle_pair

if TYPE_CHECKING:
    from .step_loss import PairLoss


def coupled(config: DPOTrainConfig) -> bool:
    """Whether a pair's loss depends on the others of its step (AOT sorts over them)."""
    return config.rows == "pairs" and any(
        dk.losses.get(name).batch_coupled for name in config.loss_type
    )


def coupled_gradients(
    loss: PairLoss, data: PairData, indices: list[int], parts: Parts, num_chosen: int, more: bool
) -> tuple[HeadOutput, int, int]:
    """Gradients of a loss that couples the pairs of a step which runs in several batches.

    A scoring pass without gradient gives every log-prob of the step, on all ranks; the loss of all
    of them gives the slope of each, and a second pass carries the slopes back. The loss has the
    pairs in the order of `indices`, whatever the batches: beta-DPO draws from them. (loss and
    log-probs, real tokens, positions of the trunk's calls; these of this rank). `more`: gradients
    of other rows follow.
    """
    policy, step = loss.policy, {i: at for at, i in enumerate(indices)}
    pairs = [data.pairs[i] for i in indices]
    table = Table(policy.ranks, policy.device, 2, len(indices))
    wide = policy.head.weight.dtype == torch.float64
    with torch.no_grad():
        for part in parts:
            if part is None:
                idle_pair(policy, pairs[0])
                continue
            sums = policy.logps(policy.batch([data.pairs[i] for i in part]))
            table.put([step[i] for i in part], *sums.chunk(2))
    table.reduce()
    values = table.values.to(torch.float64 if wide else torch.float32)
    chosen, rejected = (x.clone().requires_grad_() for x in values)
    reference = loss.reference(data, indices, None)
    assert not isinstance(reference, ReferenceStates)
    against = (None, None) if reference is None else reference.chunk(2)
    options: dict[str, Any] = {
        f"{name}_lengths": to_device(
            torch.tensor([p.sequences[side].num_scored for p in pairs]), policy.device
        )
        for side, name in enumerate(("chosen", "rejected"))
    }
    function = loss.function
    options |= {**function.options, **loss.offset(pairs), "num_chosen_tokens": max(num_chosen, 1)}
    options |= dict.fromkeys(dk.losses.fresh_state(function.options["loss_type"]), function.state)
    out = dk.preference_loss(chosen, rejected, *against, **options)
    slopes = torch.autograd.grad(out.loss, (chosen, rejected))
    tokens = computed = 0
    for k, part in enumerate(parts):
        with policy.sharded.micro_batch(k == parts.rounds - 1 and not more):
            if part is None:
                idle_pair(policy, pairs[0])
                continue
            batch = policy.batch([data.pairs[i] for i in part])
            at = torch.tensor([step[i] for i in part], device=policy.device)
            carried = (policy.logps(batch) * torch.cat([x[at] for x in slopes])).sum()
            (carried * policy.sharded.scale).backward()
            tokens += batch.num_tokens
            computed += sum(call.input_ids.numel() for call in batch.calls)
    shown = HeadOutput(
        loss=out.loss.detach(),
        pair_logps=torch.stack([out.chosen_logps, out.rejected_logps]),
        rewards=torch.stack([out.chosen_rewards, out.rejected_rewards]),
    )
    return shown, tokens, computed
