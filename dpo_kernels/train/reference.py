"""The reference's log-probs, computed once before training.

The reference is the starting policy, or a model that is let go afterwards: its log-probs are one
forward pass over all pairs, and no second model is held or run during training. Sums per sequence
are kept, or values per token where the loss needs them (LD-DPO weighs tokens). A loss of whole
distributions (TDPO) needs more than log-probs: for it alone the reference stays, frozen, and runs
over every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import ScoredBatch, TokenPair
from ..inputs.transfer import to_device
from ..models.forward import ReferenceStates
from ..models.references import needs_reference, needs_states
from ..models.structure import deterministic
from .config import DPOTrainConfig
from .console import Console
from .model import Policy, frozen_copy, load_reference


@dataclass(frozen=True)
class Reference:
    """Log-probs of pair i: `chosen[i]` and `rejected[i]`, each [] (a sum) or [scored tokens]."""

    chosen: dict[int, Tensor]
    rejected: dict[int, Tensor]

    def of(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """`ref_logps` of a batch: [2B] sums, or [N] per token, chosen before rejected."""
        values = [self.chosen[i] for i in indices] + [self.rejected[i] for i in indices]
        joined = torch.stack(values) if values[0].dim() == 0 else torch.cat(values)
        return to_device(joined, device)


@dataclass(frozen=True)
class WholeReference:
    """The reference itself, for losses of whole distributions."""

    policy: Policy

    @torch.no_grad()
    def states(self, batch: ScoredBatch) -> ReferenceStates:
        """What the head of the policy compares its own states of `batch` with."""
        with deterministic(self.policy.model):
            return ReferenceStates(self.policy.hidden(batch), self.policy.head_arguments())


@dataclass(frozen=True)
class PairData:
    """Tokenised pairs and the reference of them (None: the loss has no reference)."""

    pairs: list[TokenPair]
    reference: Reference | WholeReference | None = None


def reference_model(
    policy: Policy, config: DPOTrainConfig, say: Callable[[str], None]
) -> Policy | None:
    """The reference where it is a model of its own; None: the policy as it starts."""
    options = config.loss_options()
    if config.ref_model_name_or_path is not None:
        return load_reference(config, policy, say) if needs_reference(options) else None
    return frozen_copy(policy) if needs_states(options) else None


@torch.no_grad()
def with_reference(
    policy: Policy,
    pairs: list[TokenPair],
    config: DPOTrainConfig,
    console: Console,
    what: str,
    used: Sequence[int] | None = None,
) -> PairData:
    """The pairs with the log-probs that `policy` (the reference), as it is now, gives them.

    `used`: the only pairs that will be asked for (a run of few steps does not visit all). Else the
    batches are those of `evaluate`, so that an evaluation of the unchanged policy repeats the
    same arithmetic.
    """
    if not needs_reference(config.loss_options()):
        return PairData(pairs)
    if needs_states(config.loss_options()):
        return PairData(pairs, WholeReference(policy))
    per_token = config.ld_alpha is not None
    size = config.per_device_eval_batch_size
    reference = Reference({}, {})
    used = range(len(pairs)) if used is None else used
    starts = range(0, len(used), size)
    for start in console.progress(starts, f"reference log-probs ({what})", len(starts), "batches"):
        group = used[start : start + size]
        batch = policy.batch([pairs[i] for i in group])
        with deterministic(policy.model):
            logps = policy.logps(batch, "none" if per_token else "sum").cpu()
        values = list(logps.split(batch.scored_lengths) if per_token else logps)
        for i, chosen, rejected in zip(group, values, values[len(group) :], strict=False):
            reference.chosen[i], reference.rejected[i] = chosen.clone(), rejected.clone()
    return PairData(pairs, reference)
