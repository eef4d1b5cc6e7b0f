"""The same step in plain torch, to put a time beside ours.

What the fused path replaces: pad the batch, let the model give logits for every position, take
log_softmax, gather. Same pairs, same weights, forward and backward, no optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..data import TokenPair
from .config import DPOTrainConfig
from .model import Policy
from .reference import PairData, Reference
from .step_loss import PairLoss, chosen_tokens


def plain_logps(model: Any, pairs: list[TokenPair], pad_id: int) -> Tensor:
    """[2B] sums over completion tokens, from the model's own logits [2B, T, V]."""
    sequences = [p.sequences[0] for p in pairs] + [p.sequences[1] for p in pairs]
    device = model.get_output_embeddings().weight.device
    T = max(len(s.ids) for s in sequences)
    ids = torch.full((len(sequences), T), pad_id)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, s in enumerate(sequences):
        ids[i, : len(s.ids)] = torch.tensor(s.ids)
        mask[i, : len(s.ids)] = 1
        scored[i, list(s.scored)] = True
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = logits[:, :-1].to(wide).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # where, not times: some models give NaN where padding sees nothing
    return torch.where(scored[:, 1:], logps, 0.0).sum(-1)


def step_times(
    policy: Policy, data: PairData, indices: list[int], config: DPOTrainConfig, repeats: int = 5
) -> tuple[list[float], list[float]]:
    """Seconds of forward + backward of these pairs: ours and plain torch, alternating."""
    pairs = [data.pairs[i] for i in indices]
    B, tokens = len(pairs), chosen_tokens(pairs)
    loss = PairLoss(policy, config)
    reference = torch.zeros(2 * B, device=policy.device)
    if isinstance(data.reference, Reference) and config.ld_alpha is None:
        reference = data.reference.of(indices, policy.device)

    def ours() -> None:
        out, _ = loss(data, indices, B, tokens)
        assert out.loss is not None
        out.loss.backward()

    def plain() -> None:
        ratio = plain_logps(policy.model, pairs, policy.pad_id) - reference
        (-logsigmoid(config.beta * (ratio[:B] - ratio[B:])).mean()).backward()

    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for step, taken in ((ours, times[0]), (plain, times[1])):
            seconds = timed(step, policy)
            if repeat:  # the first is the warm-up
                taken.append(seconds)
            policy.model.zero_grad(set_to_none=True)
    return times


def timed(step: Callable[[], None], policy: Policy) -> float:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    began = time.perf_counter()
    step()
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    return time.perf_counter() - began
