"""One optimizer step's pairs in the batches that run forward and backward on their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data import TokenRow
from ..data.batches import laid_out_tokens, within_budget
from .config import DPOTrainConfig
from .model import Policy
from .reference import PairData
from .step_loss import StepLoss
from .whole_step import coupled

# On a CPU a batch is run in parts of about this many tokens: as fast (the matrix products are large
# enough), and only one part's activations are alive at a time. Results differ by rounding alone.
CPU_PART_TOKENS = 1024


def batches_of(
    indices: list[int], pairs: Sequence[TokenRow], config: DPOTrainConfig, policy: Policy
) -> list[list[int]]:
    """One optimizer step's pairs in the batches that run forward and backward on their own."""
    groups = groups_of(indices, pairs, config, policy)
    return [
        same
        for group in groups
        for part in parts_of(group, pairs, config, policy)
        for same in of_one_length(part, pairs)
    ]


def groups_of(
    indices: list[int], pairs: Sequence[TokenRow], config: DPOTrainConfig, policy: Policy
) -> list[list[int]]:
    """One optimizer step's pairs by number, or up to a budget of tokens; the loss is the same."""
    budget = config.max_tokens_per_batch
    if budget is not None:
        sharing = policy.sharing
        return within_budget(indices, lambda i: laid_out_tokens(pairs[i], sharing), budget)
    micro = config.per_device_train_batch_size
    return [indices[start : start + micro] for start in range(0, len(indices), micro)]


def parts_of(
    indices: list[int], pairs: Sequence[TokenRow], config: DPOTrainConfig, policy: Policy
) -> list[list[int]]:
    """One batch cut into the parts that run forward and backward on their own.

    Losses that couple the pairs of a batch (AOT sorts over it) need it whole, as a router's loss
    does; so does a GPU, and so does who gave a budget of tokens.
    """
    budget = config.max_tokens_per_batch is not None
    if budget or policy.router_weight or coupled(config) or policy.device.type != "cpu":
        return [indices]
    parts: list[list[int]] = []
    tokens = CPU_PART_TOKENS
    for i in indices:
        size = pairs[i].size
        if tokens + size > CPU_PART_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(i)
        tokens += size
    return parts


def of_one_length(indices: Sequence[int], rows: Sequence[TokenRow]) -> list[list[int]]:
    """A batch cut into those of rows with the same number of sequences: lists of K each."""
    apart: dict[int, list[int]] = {}
    for i in indices:
        apart.setdefault(len(rows[i].sequences), []).append(i)
    return list(apart.values())


def begin(loss: StepLoss, data: PairData, indices: Sequence[int], config: DPOTrainConfig) -> None:
    """What a step needs to know of all its rows before the first backward: kto's z."""
    asked: Any = data.mismatched and data.mismatched.pairs
    if asked is not None:
        keys = asked.keys(indices)
        loss.begin(data, keys, batches_of(keys, asked, config, loss.policy))
