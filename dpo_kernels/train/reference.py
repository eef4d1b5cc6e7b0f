"""The reference's log-probs: computed once before training, as rows come, or taken from the cache.

The reference is the starting policy or another checkpoint (`ref_model_name_or_path`), perhaps an
adapter beside the policy's (`ref_adapter_name`). Its log-probs
are one pass over all pairs, so no second model is held during training, and what the cache
(`models/reference_cache.py`) holds is not computed again. Three kinds of runs hold a model: those
whose reference moves (`sync_ref_model`: TR-DPO and EMA; nothing of it is cached), those whose loss
compares whole distributions (TDPO), and those that stream their data, which are not to wait for a
pass.

Sums per sequence are kept, or values per token where the loss needs them (LD-DPO weighs tokens).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data import ScoredBatch, TokenRow, TokenSequence, sequences_of
from ..inputs.transfer import to_device
from ..models.forward import ReferenceStates
from ..models.reference_cache import (
    ReferenceCache,
    default_folder,
    reference_identity,
    sequence_key,
)
from ..models.references import needs_reference, needs_states
from ..models.structure import deterministic
from .config import DPOTrainConfig, UserError
from .console import Console
from .model import Policy, frozen_copy, load_reference, over_ranks
from .ranks import agreed
from .step_parts import Parts, idle_pair, tokens_of


class References(Protocol):
    """Log-probs by the numbers of the pairs (or other rows)."""

    def of(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """`ref_logps` of a batch: [2B] sums, or [N] per token, in the order of its sequences."""

    def after_step(self, policy: Policy, step: int) -> None:
        """Called when optimizer step `step` is done."""


class Reference:
    """Log-probs of row i: `sides[k][i]` of its sequence k, each [] (a sum) or [scored tokens]."""

    def __init__(self, *sides: dict[int, Tensor]) -> None:
        self.sides = list(sides)

    @property
    def chosen(self) -> dict[int, Tensor]:
        """Of the first sequences, which every row has."""
        return self.sides[0] if self.sides else {}

    @property
    def rejected(self) -> dict[int, Tensor]:
        return self.sides[1]

    def keep(self, rows: Sequence[tuple[int, TokenRow]], values: Iterable[Tensor]) -> None:
        """Take the values of numbered rows, in the order of their batch's sequences."""
        found = iter(values)
        for k in range(max(len(row.sequences) for _, row in rows)):
            if k == len(self.sides):
                self.sides.append({})
            for i, row in rows:
                if k < len(row.sequences):
                    self.sides[k][i] = next(found).clone()

    def beside(self, other: Reference) -> Reference:
        """What both know."""
        none: dict[int, Tensor] = {}
        both = itertools.zip_longest(self.sides, other.sides, fillvalue=none)
        return Reference(*(a | b for a, b in both))

    def of(self, indices: Sequence[int], device: torch.device) -> Tensor:
        values = [self.chosen[i] for i in indices]
        values += [side[i] for side in self.sides[1:] for i in indices if i in side]
        return to_device(_joined(values), device)

    def after_step(self, policy: Policy, step: int) -> None:
        """Nothing: it stays as it is."""


class LiveReference:
    """A reference model that is asked batch by batch; of `sync_ref_model` it follows the policy.

    `whole`: the loss compares whole distributions, and takes `states`.
    """

    def __init__(
        self,
        reference: Policy,
        pairs: Sequence[TokenRow],
        config: DPOTrainConfig,
        cache: ReferenceCache | None,
        follows: bool = True,
    ) -> None:
        self.reference, self.pairs, self.cache = reference, pairs, cache
        self.per_token = config.ld_alpha is not None
        self.every = config.ref_model_sync_steps if config.sync_ref_model and follows else 0
        self.share = config.ref_model_mixup_alpha
        self.whole = needs_states(config.loss_options())

    @torch.no_grad()
    def states(self, batch: ScoredBatch) -> ReferenceStates:
        """What the head of the policy compares its own states of `batch` with."""
        with deterministic(self.reference.model):
            return ReferenceStates(self.reference.hidden(batch), self.reference.head_arguments())

    @torch.no_grad()
    def of(self, indices: Sequence[int], device: torch.device) -> Tensor:
        pairs = [self.pairs[i] for i in indices]
        sequences = sequences_of(pairs)
        keys = [sequence_key(s) for s in sequences] if self.cache is not None else []
        values = self.cache.get(keys) if self.cache is not None else None
        if values is None:
            values = _scores(self.reference, pairs)
            if self.cache is not None:
                self.cache.put(keys, values)
                self.cache.refresh()
        values = [v.to(self._dtype) for v in values]
        return to_device(_joined(values if self.per_token else [v.sum() for v in values]), device)

    @property
    def _dtype(self) -> torch.dtype:
        wide = self.reference.head.weight.dtype == torch.float64
        return torch.float64 if wide else torch.float32

    @torch.no_grad()
    def after_step(self, policy: Policy, step: int) -> None:
        """TR-DPO: reference <- share * policy + (1 - share) * reference, every `every` steps."""
        if not self.every or step % self.every:
            return
        theirs = dict(policy.model.named_parameters())
        for name, mine in self.reference.model.named_parameters():
            mine.lerp_(theirs[name].to(mine), self.share)


@dataclass(frozen=True)
class PairData:
    """Tokenised pairs (or other rows) and their reference (None: the loss has no reference)."""

    pairs: Sequence[Any]
    reference: References | None = None
    conversations: Sequence[TokenSequence] = ()  # held out, beside pairs that are
    mismatched: PairData | None = None  # of kto: completions under prompts that are not theirs


def _joined(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values[0].dim() == 0 else torch.cat(values)


def _scores(policy: Policy, pairs: Sequence[TokenRow], per_token: bool = True) -> list[Tensor]:
    """[scored tokens] of each sequence, chosen then rejected; else their sums."""
    batch = policy.batch(list(pairs))
    with deterministic(policy.model):
        logps = policy.logps(batch, "none" if per_token else "sum").cpu()
    return list(logps.split(batch.scored_lengths) if per_token else logps)


def _scored_into(cache: ReferenceCache, policy: Policy, pairs: Sequence[TokenRow]) -> list[Tensor]:
    """`_scores`, kept in the cache as soon as they are there."""
    values = _scores(policy, pairs)
    cache.put([sequence_key(s) for s in sequences_of(pairs)], values)
    cache.refresh()
    return values


class Referee:
    """Who gives a run's reference log-probs, and the cache that they are kept in."""

    def __init__(
        self, policy: Policy, config: DPOTrainConfig, console: Console, own: bool = True
    ) -> None:
        self.policy, self.config, self.console = policy, config, console
        self.needed = needs_reference(config.loss_options())
        self.other: Policy | None = None
        self.cache: ReferenceCache | None = None
        self._live: Policy | None = None
        self.whole = False
        if not self.needed:
            return
        if config.reference_name:
            self.other = load_reference(config, policy, console.say)
            over_ranks(self.other, config, policy.ranks)
            console.say(
                f"reference: {config.reference_name}, another checkpoint than the policy "
                "(step 0 tells whether they differ)"
            )
        self.whole = needs_states(config.loss_options())
        if self.stays and policy.sharded.in_parts:
            what = "sync_ref_model" if config.sync_ref_model else "a loss of whole distributions"
            raise agreed(
                UserError(
                    f"fsdp: {what} keeps a reference beside the policy, which is not sharded: use "
                    "fsdp=none without vocab_parallel, where each process has both whole"
                )
            )
        if self.whole and not config.sync_ref_model:
            console.say("reference: stays beside the policy (a loss of whole distributions)")
            return
        if config.sync_ref_model:
            console.say(
                "reference: follows the policy (sync_ref_model), so nothing of it is cached"
            )
            return
        # The embedded default is new at each run; what was named is used for it too.
        if own or config.reference_cache not in ("auto", None):
            self.cache = open_cache(self.other or policy, config, console)

    def data(
        self,
        pairs: Sequence[TokenRow],
        what: str,
        used: Sequence[int] | None = None,
        live: bool = False,
    ) -> PairData:
        """The pairs with their reference; `live`: asked for as the rows come."""
        if not self.needed:
            return PairData(pairs)
        if live or self.config.sync_ref_model or self.whole:
            first = self._live is None
            if self._live is None:
                self._live = self.other or frozen_copy(self.policy)
            # One model for the training pairs, which move it, and the held-out ones.
            return PairData(pairs, LiveReference(self._live, pairs, self.config, self.cache, first))
        model = self.other or self.policy
        return with_reference(model, pairs, self.config, self.console, what, used, self.cache)

    @property
    def stays(self) -> bool:
        """Whether a model is held while the policy is trained."""
        return self.whole or (self.needed and self.config.sync_ref_model)

    def done(self) -> None:
        """The passes are over: what only they needed goes."""
        if self._live is None:
            self.other = None


def open_cache(policy: Policy, config: DPOTrainConfig, console: Console) -> ReferenceCache | None:
    """The cache of what `policy`, as it is now, gives; None where there is to be none."""
    if config.reference_cache is None:
        return None
    named = config.reference_cache != "auto"
    folder = config.reference_cache if named else default_folder()
    try:
        identity = reference_identity(policy.model, policy.dtype)
        return ReferenceCache(folder, identity, console.say)
    except OSError as error:
        if named:
            raise UserError(
                f"reference_cache: {folder} cannot be written to: {error.strerror}"
            ) from None
        console.say(f"reference cache: none ({folder}: {error.strerror})")
        return None


@torch.no_grad()
def with_reference(
    policy: Policy,
    pairs: Sequence[TokenRow],
    config: DPOTrainConfig,
    console: Console,
    what: str,
    used: Sequence[int] | None = None,
    cache: ReferenceCache | None = None,
) -> PairData:
    """The pairs with the log-probs that `policy` (the reference), as it is now, gives them.

    `used`: the only pairs that will be asked for (a run of few steps does not visit all). Else the
    batches are those of `evaluate`, so that an evaluation of the unchanged policy repeats the
    same arithmetic.
    """
    if not needs_reference(config.loss_options()):
        return PairData(pairs)
    per_token = config.ld_alpha is not None
    size = config.per_device_eval_batch_size
    reference = Reference()
    used = range(len(pairs)) if used is None else used
    if policy.ranks.many:
        return PairData(
            pairs, _over_ranks(policy, pairs, used, size, per_token, cache, console, what)
        )
    if cache is not None:
        _fill(cache, policy, pairs, used, size, console, what)
        for start in range(0, len(used), size):
            group = used[start : start + size]
            values = cache.get([sequence_key(s) for s in sequences_of([pairs[i] for i in group])])
            if values is None:  # damaged between the pass and now
                values = _scores(policy, [pairs[i] for i in group])
            values = values if per_token else [_sum(v) for v in values]
            reference.keep([(i, pairs[i]) for i in group], values)
        return PairData(pairs, reference)
    starts = range(0, len(used), size)
    for start in console.progress(starts, f"reference log-probs ({what})", len(starts), "batches"):
        group = used[start : start + size]
        rows = [pairs[i] for i in group]
        reference.keep([*zip(group, rows, strict=True)], _scores(policy, rows, per_token))
    return PairData(pairs, reference)


def _sum(values: Tensor) -> Tensor:
    return values.double().sum().to(values.dtype)


def _over_ranks(
    policy: Policy,
    pairs: Sequence[Any],
    used: Sequence[int],
    size: int,
    per_token: bool,
    cache: ReferenceCache | None,
    console: Console,
    what: str,
) -> Reference:
    """The pass divided over the ranks, in the batches of one process; each then has all of it.

    What a rank has scored it puts into its cache. What any rank lacks is scored: the ranks may see
    different folders.
    """
    ranks, reference = policy.ranks, Reference()
    if cache is not None:
        for i in used:
            values = cache.get([sequence_key(s) for s in pairs[i].sequences])
            if values is not None:
                kept = values if per_token else [_sum(v) for v in values]
                reference.keep([(i, pairs[i])], kept)
    lacking = [float(i not in reference.chosen) for i in used]
    counts = ranks.sum(torch.tensor(lacking, device=policy.device)).tolist()
    todo = [i for i, count in zip(used, counts, strict=True) if count]
    title = f"reference log-probs ({what})"
    if cache is not None and len(todo) < len(used):
        console.say(f"{title}: {len(used) - len(todo)} of {len(used)} pairs are in the cache")
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    parts = Parts.whole_batches(ranks, batches, lambda i: tokens_of(pairs[i]))
    mine = Reference()
    for group in console.progress(parts, title, parts.rounds, "batches"):
        ranks.at(title)
        if group is None:
            idle_pair(policy, pairs[todo[0]])
            continue
        rows = [pairs[i] for i in group]
        if cache is None:
            kept = _scores(policy, rows, per_token)
        else:
            values = _scored_into(cache, policy, rows)
            kept = values if per_token else [_sum(v) for v in values]
        mine.keep([*zip(group, rows, strict=True)], kept)
    policy.sharded.rest()
    for start in range(0, len(todo), _EXCHANGED):
        _exchange(policy, pairs, todo[start : start + _EXCHANGED], per_token, mine, reference)
    return reference


_EXCHANGED = 4096  # pairs whose values are sent at once


def _exchange(
    policy: Policy,
    pairs: Sequence[Any],
    todo: Sequence[int],
    per_token: bool,
    mine: Reference,
    into: Reference,
) -> None:
    """Values of `todo`, each found by one rank, for all of them."""
    wide = policy.head.weight.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    sequences = {i: pairs[i].sequences for i in todo}
    sides = max(map(len, sequences.values()))
    into.sides += [{} for _ in range(sides - len(into.sides))]
    for k in range(sides):
        own = mine.sides[k] if k < len(mine.sides) else {}
        having = [i for i in todo if k < len(sequences[i])]
        lengths = [sequences[i][k].num_scored if per_token else 1 for i in having]
        parts = [
            own[i].reshape(-1) if i in own else torch.zeros(n)
            for i, n in zip(having, lengths, strict=True)
        ]
        flat = torch.cat([p.to(dtype) for p in parts]).to(policy.device)
        whole = policy.ranks.sum(flat).cpu().split(lengths)
        found = zip(having, whole, strict=True)
        into.sides[k].update({i: v.clone() if per_token else v[0].clone() for i, v in found})


def _fill(
    cache: ReferenceCache,
    policy: Policy,
    pairs: Sequence[TokenRow],
    used: Sequence[int],
    size: int,
    console: Console,
    what: str,
) -> None:
    """Score what the cache lacks, a batch at a time, each kept as soon as it is there."""
    keys = {i: [sequence_key(s) for s in pairs[i].sequences] for i in used}

    def lacks(i: int) -> bool:
        return any(key not in cache for key in keys[i])

    todo = [i for i in used if lacks(i)]
    if not todo:
        console.say(
            f"reference log-probs ({what}): all {len(used)} pairs are in the cache, no pass"
        )
        return
    if len(todo) < len(used):
        console.say(
            f"reference log-probs ({what}): {len(used) - len(todo)} of {len(used)} pairs are in "
            "the cache"
        )
    starts = list(range(0, len(todo), size))
    with cache.pass_from_the_front() as front:
        order = starts if front else starts[::-1]
        title = f"reference log-probs ({what})"
        for start in console.progress(order, title, len(order), "batches"):
            group = todo[start : start + size]
            if not any(lacks(i) for i in group):  # another run was there first
                continue
            _scored_into(cache, policy, [pairs[i] for i in group])
