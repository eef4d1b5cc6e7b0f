"""Batches that compute each real token once: trunk calls, and the rows of them that are scored.

A batch of `B` pairs is `2B` sequences, chosen 0..B-1 then rejected 0..B-1. The trunk (the model
without its head) runs over one or more calls; from their hidden states, concatenated and flattened,
`rows` picks the state that predicts each scored token, in sequence order. So whatever the layout,
the head sees `hidden [N, H]`, `labels [N]` and `cu_seqlens [2B + 1]` (`shift=False`).

Two layouts of a pair, mixed freely in one batch:

- plain: two rows, prompt ++ chosen and prompt ++ rejected, right-padded to their call. No attention
  mask is needed: attention is causal, so a real token never sees the padding behind it.
- shared: one row, prompt ++ chosen ++ rejected, the prompt computed once. A 4-D mask hides the
  chosen branch from the rejected one, whose positions restart where the prompt ends. The state of
  the last prompt token predicts the first token of both branches and is gathered twice; autograd
  adds the two gradients. (Prefix sharing: arXiv 2410.20305, without its duplicated token.)

A mask makes attention pay for every (query, key) entry of the row, hidden or not, where the plain
causal path pays for half. So sharing wins when the prompt is long beside the completions;
`Sharing("auto")` takes the cheaper of the two for each pair by counting both.

Letters: `B` pairs, `R` rows and `S` positions of a trunk call, `N` scored tokens, `L` shared
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..inputs.transfer import to_device
from .sequences import Ids, TokenPair, TokenSequence

# What one more trunk call costs, in tokens: rows are padded into a common call as long as the
# padding costs less than that. Only a throughput choice; results do not depend on it.
CPU_CALL_TOKENS = 48


@dataclass(frozen=True)
class Sharing:
    """How pairs are laid out: "padded" (plain rows), "prefix" (always shared) or "auto".

    `attention_ratio` is the cost of one (query, key) entry of all layers over that of one token of
    all linear maps: 2 H / parameters per layer, roughly. `call_tokens` is `CPU_CALL_TOKENS` or, on
    a GPU where one large call is best, None.
    """

    mode: str = "padded"
    attention_ratio: float = 0.0
    call_tokens: int | None = CPU_CALL_TOKENS

    def shares(self, prefix: int, chosen: int, rejected: int) -> bool:
        """Whether a pair of sequences of these lengths, the first `prefix` equal, is one row."""
        if self.mode != "auto":
            return self.mode == "prefix"
        S = chosen + rejected - prefix
        entries = S * S - (chosen * chosen + rejected * rejected) / 2
        return prefix > self.attention_ratio * entries


@dataclass(frozen=True)
class TrunkCall:
    """One forward of the trunk."""

    input_ids: Tensor  # [R, S] int64
    position_ids: Tensor | None  # [R, S]; None: 0..S-1
    mask: Tensor | None  # [R, 1, S, S] bool, True where a query sees a key; None: causal
    lengths: list[int]  # [R] real tokens of each row


@dataclass(frozen=True)
class ScoredBatch:
    """Trunk calls and the scored rows of their hidden states."""

    calls: list[TrunkCall]
    rows: Tensor  # [N] int64 into the concatenated, flattened hidden states
    labels: Tensor  # [N] int64, on the host as the next two: the loss counts them there
    cu_seqlens: Tensor  # [sequences + 1] int64
    scored_lengths: list[int]  # [sequences]
    sources: list[str]  # where each pair (or sequence) came from
    num_tokens: int  # real tokens of all sequences, prompts counted in each (as TRL counts)
    num_chosen_scored: int  # scored tokens of the first half of the sequences

    def to(self, device: torch.device | str) -> ScoredBatch:
        """The same batch with what the trunk reads on `device`; the labels stay."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else to_device(x, device)

        calls = [
            replace(
                call,
                input_ids=to_device(call.input_ids, device),
                position_ids=move(call.position_ids),
                mask=move(call.mask),
            )
            for call in self.calls
        ]
        return replace(self, calls=calls, rows=to_device(self.rows, device))


@dataclass
class _Row:
    """One row of a call before padding. `branch` is (L, end of chosen) for a shared row."""

    ids: Ids
    branch: tuple[int, int] | None
    start: int = 0  # flat index of its first position, once placed


def make_batch(pairs: Sequence[TokenPair], sharing: Sharing, pad_id: int) -> ScoredBatch:
    """The batch of these pairs: sequences [chosen; rejected]."""
    if not pairs:
        raise ValueError("a batch needs at least one pair, got none")
    rows: list[_Row] = []
    first: list[tuple[_Row, TokenSequence]] = []
    second: list[tuple[_Row, TokenSequence]] = []
    for pair in pairs:
        chosen, rejected = pair.sequences
        L = _shared_length(chosen.ids, rejected.ids)
        if sharing.shares(L, len(chosen.ids), len(rejected.ids)):
            row = _Row(chosen.ids + rejected.ids[L:], (L, len(chosen.ids)))
            rows.append(row)
            first.append((row, chosen))
            second.append((row, rejected))
        else:
            alone = _Row(chosen.ids, None), _Row(rejected.ids, None)
            rows.extend(alone)
            first.append((alone[0], chosen))
            second.append((alone[1], rejected))
    calls = _calls(rows, sharing.call_tokens, pad_id)
    indices = [_predictors(row, seq, False) for row, seq in first]
    indices += [_predictors(row, seq, True) for row, seq in second]
    return _assemble(
        calls, indices, [s for _, s in first + second], [p.source for p in pairs], len(pairs)
    )


def make_sequence_batch(
    sequences: Sequence[TokenSequence], sharing: Sharing, pad_id: int
) -> ScoredBatch:
    """A batch of single sequences (SFT); nothing is shared."""
    rows = [_Row(s.ids, None) for s in sequences]
    calls = _calls(rows, sharing.call_tokens, pad_id)
    indices = [_predictors(row, seq, False) for row, seq in zip(rows, sequences, strict=True)]
    return _assemble(calls, indices, list(sequences), [s.source for s in sequences], len(sequences))


def _assemble(
    calls: list[TrunkCall],
    indices: list[Tensor],
    sequences: list[TokenSequence],
    sources: list[str],
    first_half: int,
) -> ScoredBatch:
    counts = [s.num_scored for s in sequences]
    labels = [s.ids[t] for s in sequences for t in s.scored]
    return ScoredBatch(
        calls=calls,
        rows=torch.cat(indices),
        labels=torch.tensor(labels, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *counts], dtype=torch.int64).cumsum(0),
        scored_lengths=counts,
        sources=sources,
        num_tokens=sum(len(s.ids) for s in sequences),
        num_chosen_scored=sum(counts[:first_half]),
    )


def _shared_length(a: Ids, b: Ids) -> int:
    """Length of the common start, leaving each sequence at least one token of its own."""
    limit = min(len(a), len(b)) - 1
    n = 0
    while n < limit and a[n] == b[n]:
        n += 1
    return n


def _predictors(row: _Row, sequence: TokenSequence, rejected: bool) -> Tensor:
    """Flat index of the state that predicts each scored token: that of the position before it."""
    positions = torch.tensor(sequence.scored, dtype=torch.int64) - 1
    if rejected and row.branch is not None:
        L, end = row.branch
        positions = torch.where(positions < L, positions, positions + (end - L))
    return row.start + positions


def _calls(rows: list[_Row], call_tokens: int | None, pad_id: int) -> list[TrunkCall]:
    """Group rows of one kind and similar length into calls, and place each row."""
    groups: list[list[_Row]] = []
    for shared in (True, False):
        kind = [row for row in rows if (row.branch is not None) == shared]
        for row in sorted(kind, key=lambda r: -len(r.ids)):  # stable: deterministic
            joins = (
                groups
                and (groups[-1][0].branch is not None) == shared
                and (call_tokens is None or len(groups[-1][0].ids) - len(row.ids) <= call_tokens)
            )
            if joins:
                groups[-1].append(row)
            else:
                groups.append([row])
    calls, start = [], 0
    for group in groups:
        S = len(group[0].ids)
        ids = torch.full((len(group), S), pad_id, dtype=torch.int64)
        for r, row in enumerate(group):
            ids[r, : len(row.ids)] = torch.tensor(row.ids)
            row.start = start + r * S
        start += len(group) * S
        lengths = [len(row.ids) for row in group]
        branches = [row.branch for row in group if row.branch is not None]
        if branches:
            calls.append(TrunkCall(ids, *_shared_positions(branches, S), lengths))
        else:
            calls.append(TrunkCall(ids, None, None, lengths))
    return calls


def _shared_positions(branches: list[tuple[int, int]], S: int) -> tuple[Tensor, Tensor]:
    """position_ids [R, S] and mask [R, 1, S, S] of shared rows."""
    L = torch.tensor([b[0] for b in branches])[:, None]  # [R, 1]
    end = torch.tensor([b[1] for b in branches])[:, None]
    at = torch.arange(S)[None]  # [1, S]
    in_rejected = at >= end  # [R, S]
    in_chosen = (at >= L) & ~in_rejected
    positions = torch.where(in_rejected, at - (end - L), at)
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    mask = causal[None] & ~(in_rejected[:, :, None] & in_chosen[:, None, :])
    return positions, mask[:, None]
