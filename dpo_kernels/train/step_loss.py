"""The configured loss of an optimizer step's batches, whatever its rows are.

    pairs       any loss of the table
    unpaired    kto, apo_zero_unpaired: single completions, found good or bad
    ranked      plackett_luce: lists of K completions

`kto` compares each completion with z, one number of the whole step: what the policy adds on average
to the log-probs of completions under prompts that are not theirs. It is made before the step's
first backward: a pass without gradient over all its batches, the completions shifted by one in the
step's order (`Mismatched`), and one mean of all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dpo_kernels as dk

from ..data import ScoredBatch, TokenCompletion, TokenPair, TokenRanking, TokenRow
from ..inputs.transfer import to_device
from ..models.attached import HeadOutput
from ..models.forward import PairTask, RankedTask, Reference, UnpairedTask, run_pairs
from ..models.structure import deterministic
from .config import DPOTrainConfig
from .groups import Groups
from .metrics import PairMeter, UnpairedMeter
from .model import Policy
from .reference import LiveReference, PairData
from .step_parts import Parts, Table, idle_pair, tokens_of


def loss_of(policy: Policy, config: DPOTrainConfig, groups: Groups | None = None) -> StepLoss:
    """The loss that the configuration asks for."""
    if config.rows == "unpaired":
        return UnpairedLoss(policy, config)
    return (
        RankedLoss(policy, config) if config.rows == "ranked" else PairLoss(policy, config, groups)
    )


class StepLoss:
    """Of the batches of a step: each a share of the whole, so that they add up."""

    function: Any  # a module: what the loss keeps from step to step is its state

    def __init__(self, policy: Policy, groups: Groups | None = None) -> None:
        self.policy, self.groups = policy, groups

    def __call__(
        self, data: PairData, indices: Sequence[int], num_rows: int, num_chosen_tokens: int
    ) -> tuple[HeadOutput, ScoredBatch]:
        """Loss of the rows `indices` as a share of `num_rows`, and their batch."""
        task = self.task(data, indices, self.whole(num_rows, num_chosen_tokens))
        router_weight = self.policy.router_weight * len(indices) / num_rows
        with self.policy.autocast():
            out = run_pairs(self.policy.model, {}, task, router_weight)
        assert task.batch is not None
        return out, task.batch

    def whole(self, num_rows: int, num_chosen_tokens: int) -> dict[str, Any]:
        """The options that make a batch's loss a share of its step's."""
        raise NotImplementedError

    def task(
        self, data: PairData, indices: Sequence[int], options: dict[str, Any] | None = None
    ) -> PairTask:
        """What the head is to make of the rows `indices`."""
        raise NotImplementedError

    def begin(self, data: PairData, keys: Sequence[int], batches: Sequence[Sequence[int]]) -> None:
        """Told of a step before its first batch, if `data.mismatched`: its `keys` of those."""

    def table(self, n: int) -> Table:
        """For what the ranks find of n rows."""
        return Table(self.policy.ranks, self.policy.device, 4, n)

    def meter(self) -> Any:
        """What takes the metrics of its batches."""
        return PairMeter()

    def reference(
        self, data: PairData, indices: Sequence[int], batch: ScoredBatch | None
    ) -> Reference | None:
        if isinstance(data.reference, LiveReference) and data.reference.whole:
            assert batch is not None
            return data.reference.states(batch)
        return data.reference.of(indices, self.policy.device) if data.reference else None

    def weights(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """The option `weights`, where rows have any."""
        if all(row.weight is None for row in rows):
            return {}
        found = torch.tensor([1.0 if row.weight is None else row.weight for row in rows])
        return {"weights": to_device(found, self.policy.device)}


class PairLoss(StepLoss):
    """Of batches of pairs."""

    def __init__(
        self, policy: Policy, config: DPOTrainConfig, groups: Groups | None = None
    ) -> None:
        super().__init__(policy, groups)
        # The module form, because beta-DPO keeps a running margin between batches.
        self.function = dk.FusedLinearDPOLoss(**config.loss_options())
        self.uses_offset = config.uses_offset
        self.per_token = config.ld_alpha is not None  # what the reference keeps

    def whole(self, num_rows: int, num_chosen_tokens: int) -> dict[str, Any]:
        return {"num_pairs": num_rows, "num_chosen_tokens": max(num_chosen_tokens, 1)}

    def task(
        self, data: PairData, indices: Sequence[int], options: dict[str, Any] | None = None
    ) -> PairTask:
        pairs: list[Any] = [data.pairs[i] for i in indices]
        batch = self.policy.batch(pairs)
        return PairTask(
            batch.labels,
            self.reference(data, indices, batch),
            {**(options or {}), **self.offset(pairs)},
            self.policy.fused,
            batch,
            self.per_token,
            self.function,
        )

    def offset(self, pairs: list[TokenPair]) -> dict[str, Tensor]:
        """The options that come with the rows: margins for ODPO, and numbers of pairs."""
        found: dict[str, list[float]] = {}
        if self.uses_offset:
            found["offset"] = [p.offset or 0.0 for p in pairs]
        if any(p.beta is not None for p in pairs):
            found["beta"] = [p.beta or self.function.options["beta"] for p in pairs]
        if any(p.label_smoothing is not None for p in pairs):
            usual = self.function.options["label_smoothing"]
            found["label_smoothing"] = [
                usual if p.label_smoothing is None else p.label_smoothing for p in pairs
            ]
        given = {k: to_device(torch.tensor(v), self.policy.device) for k, v in found.items()}
        given |= self.weights(pairs)
        if self.groups is None:
            return given
        plain = given.get("beta", torch.full((len(pairs),), float(self.function.options["beta"])))
        learned = self.groups.options(pairs, plain)
        if "offset" in given:
            learned["offset"] = learned["offset"] + given["offset"]
        return {**given, **learned}


class _Stateless(nn.Module):
    """A loss that keeps nothing from step to step, as a module."""

    state: Tensor | None = None

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options


class RankedLoss(StepLoss):
    """Of batches of ranked lists, all of one length (`batches_of` sees to it)."""

    def __init__(self, policy: Policy, config: DPOTrainConfig) -> None:
        super().__init__(policy)
        self.function = _Stateless(config.loss_options())

    def whole(self, num_rows: int, num_chosen_tokens: int) -> dict[str, Any]:
        return {"num_pairs": num_rows}

    def task(
        self, data: PairData, indices: Sequence[int], options: dict[str, Any] | None = None
    ) -> PairTask:
        rows = [data.pairs[i] for i in indices]
        batch = self.policy.batch(rows)
        given = {**self.function.options, **self.weights(rows), **(options or {})}
        given["num_completions"] = len(rows[0].sequences)
        reference = self.reference(data, indices, batch)
        return RankedTask(batch.labels, reference, given, self.policy.fused, batch, False)


class UnpairedLoss(StepLoss):
    """Of batches of single completions."""

    def __init__(self, policy: Policy, config: DPOTrainConfig) -> None:
        super().__init__(policy)
        self.function = _Stateless(config.loss_options())
        self.compares = config.compares_completions
        self.z = torch.zeros((), dtype=torch.float64, device=policy.device)

    def whole(self, num_rows: int, num_chosen_tokens: int) -> dict[str, Any]:
        return {"num_rows": num_rows}

    def task(
        self, data: PairData, indices: Sequence[int], options: dict[str, Any] | None = None
    ) -> PairTask:
        rows: list[Any] = [data.pairs[i] for i in indices]
        batch = self.policy.batch(rows)
        given = {**self.function.options, **self.weights(rows), **(options or {})}
        good = torch.tensor([row.desirable for row in rows])
        given["desirable"] = to_device(good, self.policy.device)
        if self.compares:
            given["z"] = self.z
        reference = self.reference(data, indices, batch)
        return UnpairedTask(batch.labels, reference, given, self.policy.fused, batch, False)

    @torch.no_grad()
    def begin(self, data: PairData, keys: Sequence[int], batches: Sequence[Sequence[int]]) -> None:
        assert data.mismatched is not None and data.mismatched.reference is not None
        policy, asked = self.policy, data.mismatched.pairs
        place = {key: at for at, key in enumerate(keys)}
        parts = Parts.whole_batches(policy.ranks, batches, lambda key: tokens_of(asked[key]))
        found = Table(policy.ranks, policy.device, 2, len(keys))
        with deterministic(policy.model):
            for part in parts:
                if part is None:
                    idle_pair(policy, asked[keys[0]])
                    continue
                ours = policy.logps(policy.batch([asked[key] for key in part]))
                theirs = data.mismatched.reference.of(part, policy.device)
                found.put([place[key] for key in part], ours, theirs)
        if policy.ranks.many:
            found.reduce()
        self.z = dk.kl_baseline(*found.values)

    def table(self, n: int) -> Table:
        return Table(self.policy.ranks, self.policy.device, 4, n, unpaired=True)

    def meter(self) -> Any:
        return UnpairedMeter()


class Mismatched(Sequence[TokenCompletion]):
    """Completions under prompts that are not theirs; number i n + j: the prompt of row i, the
    completion of row j. A sequence of all n^2, of which a run asks for n an epoch."""

    def __init__(self, rows: Sequence[Any], limit: int | None) -> None:
        self.rows, self.limit = rows, limit

    def __len__(self) -> int:
        return len(self.rows) ** 2

    def __getitem__(self, key: Any) -> Any:
        asked, said = (self.rows[i] for i in divmod(key, len(self.rows)))
        room = None if self.limit is None else max(self.limit - len(asked.prompt), 1)
        start = len(asked.prompt) - len(said.prompt)  # a span is of positions of the sequence
        return TokenCompletion(
            asked.prompt,
            said.completion[:room],
            asked.source,
            said.desirable,
            unscored=tuple((begin + start, end + start) for begin, end in said.unscored),
        )

    def keys(self, indices: Sequence[int]) -> list[int]:
        """Those of a step: each prompt with the completion of the row before it, the first with
        the last one's. A step of one row takes the row before it in the data."""
        n = len(self.rows)
        if len(indices) == 1:
            return [indices[0] * n + (indices[0] - 1) % n]
        return [i * n + indices[at - 1] for at, i in enumerate(indices)]


def chosen_tokens(rows: Sequence[TokenPair | TokenCompletion | TokenRanking]) -> int:
    """Scored tokens of the chosen (of each row's first) completions."""
    return sum(row.sequences[0].num_scored for row in rows)
