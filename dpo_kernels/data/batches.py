"""Batches that compute each real token once: trunk calls, and the rows of them that are scored.

A batch of `B` pairs is `2B` sequences, chosen 0..B-1 then rejected 0..B-1; of `B` lists of `K`
completions it is `K B`, the first of each, then the second; of single completions `B`. The trunk
(the model without its head) runs over one or more calls; from their hidden states, concatenated and
flattened, `rows` picks the state that predicts each scored token, in sequence order. So whatever
the layout, the head sees `hidden [N, H]`, `labels [N]` and `cu_seqlens` (`shift=False`).

Layouts:

- padded: two rows a pair, prompt ++ chosen and prompt ++ rejected, right-padded to their call. No
  attention mask is needed: attention is causal, so a real token never sees the padding behind it.
- packed: all sequences one behind the other in one row, each a segment (`data.segments`).
- shared: packed, and the prompt once: prompt ++ chosen is a segment, the rest of rejected another
  that sees the prompt. The state of the last prompt token predicts the first token of both
  completions and is gathered twice; autograd adds the two gradients. Of a list likewise: every
  completion but the first sees the prompt in the first one's segment.
- auto: the cheapest by counting tokens and attention entries, pair by pair.

Letters: `B` pairs, `R` rows and `S` positions of a trunk call, `N` scored tokens, `L` shared
length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..inputs.transfer import to_device
from .segments import Segment, Segments
from .sequences import Ids, TokenRow, TokenSequence, sequences_of

LAYOUTS = ("padded", "packed", "shared", "auto")
_OLD_NAMES = {"prefix": "shared"}
# What one more trunk call costs, in tokens: padded rows go into a common call as long as the
# padding costs less than that. Only a throughput choice; results do not depend on it.
CPU_CALL_TOKENS = 48
# `auto` leaves rows padded unless this share of the padded batch's work is saved.
WORTH = 0.05


def layout_name(name: str, argument: str = "layout") -> str:
    """The layout of that name, older names included; `ValueError` for another."""
    name = _OLD_NAMES.get(name, name)
    if name not in LAYOUTS:
        raise ValueError(f"{argument} must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return name


@dataclass(frozen=True)
class Sharing:
    """How pairs are laid out: "padded", "packed", "shared" (older: "prefix") or "auto".

    `attention_ratio` is the cost of one (query, key) entry of all layers over that of one token of
    all linear maps: 2 H / parameters per layer, roughly. `call_tokens` is `CPU_CALL_TOKENS` or, on
    a GPU where one large call is best, None. `may_share`: False where a prompt must not be shared
    (a router's loss counts every token), so that auto packs.
    """

    mode: str = "padded"
    attention_ratio: float = 0.0
    call_tokens: int | None = CPU_CALL_TOKENS
    may_share: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", layout_name(self.mode))

    def shares(self, prefix: int, other: int) -> bool:
        """Whether a sequence of `other` tokens, the first `prefix` its partner's, shares them."""
        if not prefix or self.mode not in ("shared", "auto"):
            return False
        if self.mode == "shared":
            return True
        # Attention pays for half of a causal segment's entries, and on a CPU, where the entries
        # of a segment with a parent go through a mask, for all of those.
        own = other - prefix
        entries = own * other - other * other / 2
        return self.may_share and prefix > self.attention_ratio * entries

    def cost(self, tokens: float, entries: float) -> float:
        """Work of so many tokens and attention entries, in tokens."""
        return tokens + self.attention_ratio * entries


@dataclass(frozen=True)
class TrunkCall:
    """One forward of the trunk: padded rows, or one packed row and its segments."""

    input_ids: Tensor  # [R, S] int64; [1, T] with segments
    position_ids: Tensor | None  # [1, T]; None: 0..S-1
    segments: Segments | None
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

    @property
    def trunk_tokens(self) -> int:
        """Positions that the trunk computes, padding included."""
        return sum(call.input_ids.numel() for call in self.calls)

    def to(self, device: torch.device | str) -> ScoredBatch:
        """The same batch with what the trunk reads on `device`; the labels stay."""
        calls = []
        for call in self.calls:
            if call.segments is not None:
                call.segments.bounds(device)  # once a batch: no layer waits for it
            positions = call.position_ids
            calls.append(
                replace(
                    call,
                    input_ids=to_device(call.input_ids, device),
                    position_ids=None if positions is None else to_device(positions, device),
                )
            )
        return replace(self, calls=calls, rows=to_device(self.rows, device))


@dataclass
class _Placed:
    """A sequence in its call: the flat place of its first token, and of the first behind `L`."""

    start: int = 0
    shared: int = 0  # L: its first tokens are another's
    rest: int = 0

    def predictors(self, sequence: TokenSequence) -> Tensor:
        """Flat place of the state that predicts each scored token: the position before it."""
        at = torch.tensor(sequence.scored, dtype=torch.int64) - 1
        return torch.where(at < self.shared, self.start + at, self.rest + at - self.shared)


def make_batch(pairs: Sequence[TokenRow], sharing: Sharing, pad_id: int) -> ScoredBatch:
    """The batch of these pairs (or other rows): sequences [chosen; rejected]."""
    if not pairs:
        raise ValueError("a batch needs at least one pair, got none")
    each = [pair.sequences for pair in pairs]
    flat = [s.ids for found in each for s in found]  # row by row
    starts = [0, *itertools.accumulate(map(len, each))]
    parents = [start for start, found in zip(starts, each, strict=False) for _ in found]
    shared = [L for found in each for L in _shared(found, sharing)]
    if _pads(sharing, flat, shared, parents):
        calls, placed = _padded(flat, sharing.call_tokens, pad_id)
    else:
        calls, placed = _packed(flat, shared, parents)
    order = [
        start + k
        for k in range(max(map(len, each)))
        for start, found in zip(starts, each, strict=False)
        if k < len(found)
    ]
    sequences = sequences_of(pairs)
    indices = [placed[i].predictors(s) for i, s in zip(order, sequences, strict=True)]
    return _assemble(calls, indices, sequences, [p.source for p in pairs], len(pairs))


def _shared(sequences: Sequence[TokenSequence], sharing: Sharing) -> list[int]:
    """Of each sequence of a row, the tokens that it shares with the first."""
    first = sequences[0].ids
    found = [0]
    for other in sequences[1:]:
        L = shared_length(first, other.ids)
        found.append(L if sharing.shares(L, len(other.ids)) else 0)
    return found


def make_sequence_batch(
    sequences: Sequence[TokenSequence], sharing: Sharing, pad_id: int
) -> ScoredBatch:
    """A batch of single sequences (SFT); nothing is shared."""
    flat = [s.ids for s in sequences]
    alone = [0] * len(flat), list(range(len(flat)))
    if _pads(sharing, flat, *alone):
        calls, placed = _padded(flat, sharing.call_tokens, pad_id)
    else:
        calls, placed = _packed(flat, *alone)
    indices = [p.predictors(s) for p, s in zip(placed, sequences, strict=True)]
    return _assemble(calls, indices, list(sequences), [s.source for s in sequences], len(sequences))


def _pads(sharing: Sharing, flat: list[Ids], shared: list[int], parents: list[int]) -> bool:
    """Whether these sequences, row by row, are to be padded rows."""
    if sharing.mode != "auto":
        return sharing.mode == "padded"
    groups = _groups([len(ids) for ids in flat], sharing.call_tokens)
    sizes = [(len(g), len(flat[g[0]])) for g in groups]
    padded = sum(sharing.cost(R * S, R * S * S / 2) for R, S in sizes)
    segments = Segments(_parts(flat, shared, parents))
    packed = sharing.cost(sum(segments.lengths), segments.entries())
    return packed > (1 - WORTH) * padded


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


def shared_length(a: Ids, b: Ids) -> int:
    """Length of the common start, leaving each sequence at least one token of its own."""
    limit = min(len(a), len(b)) - 1
    n = 0
    while n < limit and a[n] == b[n]:
        n += 1
    return n


def _groups(lengths: list[int], call_tokens: int | None) -> list[list[int]]:
    """Sequences of similar length, the longest first: each group is a padded call."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: deterministic
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (call_tokens is None or longest - lengths[i] <= call_tokens):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _padded(
    flat: list[Ids], call_tokens: int | None, pad_id: int
) -> tuple[list[TrunkCall], list[_Placed]]:
    calls, placed, start = [], [_Placed() for _ in flat], 0
    for group in _groups([len(ids) for ids in flat], call_tokens):
        S = len(flat[group[0]])
        ids = torch.full((len(group), S), pad_id, dtype=torch.int64)
        for r, i in enumerate(group):
            ids[r, : len(flat[i])] = torch.tensor(flat[i])
            placed[i].start = placed[i].rest = start + r * S
        start += len(group) * S
        calls.append(TrunkCall(ids, None, None, [len(flat[i]) for i in group]))
    return calls, placed


def _parts(flat: list[Ids], shared: list[int], parents: list[int]) -> list[Segment]:
    """A segment for each sequence; one that shares sees `shared` tokens of its row's first."""
    return [
        Segment(len(ids) - L, parent if L else -1, L)
        for ids, L, parent in zip(flat, shared, parents, strict=True)
    ]


def _packed(
    flat: list[Ids], shared: list[int], parents: list[int]
) -> tuple[list[TrunkCall], list[_Placed]]:
    parts = _parts(flat, shared, parents)
    ids: list[int] = []
    positions: list[Tensor] = []
    placed: list[_Placed] = []
    for i, part in enumerate(parts):
        start = placed[part.parent].start if part.prefix else len(ids)
        placed.append(_Placed(start, part.prefix, len(ids)))
        ids.extend(flat[i][part.prefix :])
        positions.append(torch.arange(part.prefix, part.prefix + part.length))
    row = torch.tensor([ids], dtype=torch.int64)
    return [TrunkCall(row, torch.cat(positions)[None], Segments(parts), [len(ids)])], placed


def laid_out_tokens(pair: TokenRow, sharing: Sharing) -> int:
    """Tokens of a row in a packed one, what it shares once; those of its rows if padded."""
    if sharing.mode == "padded":
        return padded_tokens([pair])
    sequences = pair.sequences
    return sum(len(s.ids) for s in sequences) - sum(_shared(sequences, sharing))


def padded_tokens(rows: Sequence[TokenRow]) -> int:
    """Positions of these rows in one call, each sequence padded to the longest."""
    lengths = [len(s.ids) for row in rows for s in row.sequences]
    return len(lengths) * max(lengths)


def within_budget(
    indices: Sequence[int], size: Callable[[int], int], budget: int
) -> list[list[int]]:
    """One optimizer step's `indices` in batches of at most `budget` tokens, in their order.

    First fit, the largest first: fewest batches that are nearly full. A function of the list alone,
    so of (seed, epoch), whatever the number of workers. One that is larger than the budget is a
    batch of its own.
    """
    places = sorted(range(len(indices)), key=lambda at: -size(indices[at]))  # stable
    bins: list[list[int]] = []
    room: list[int] = []
    for at in places:
        need = size(indices[at])
        for b, left in enumerate(room):
            if need <= left:
                bins[b].append(at)
                room[b] -= need
                break
        else:
            bins.append([at])
            room.append(budget - need)
    return [[indices[at] for at in sorted(group)] for group in sorted(bins, key=min)]
