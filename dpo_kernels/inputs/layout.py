"""How rows of logits are grouped into sequences: padded `[rows, T]` or packed `[N]` + `cu_seqlens`.

Both become one form for the ops: `targets` [R, T] aligned with the rows of logits (R = 1 when
packed) and, when packed, the boundaries of the sequences. With `shift` (Hugging Face's convention)
row t scores the label of position t + 1 of the same sequence; a sequence's last row scores nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import load, usable
from ..ops.direct import eager
from . import checks
from .transfer import to_device

# How far two states of one context may be apart, of their size. A pair that keeps its common start
# for nothing costs time, one that loses it for nothing has a wrong loss.
SAME_CONTEXT = 0.1


class Scored(NamedTuple):
    """What labels are of: an argument [S, T, last], or packed [N, last]."""

    name: str
    rows: Tensor
    last: str


def _check_rows(name: str, tensor: Tensor, lead: torch.Size, last: str) -> None:
    if tensor.dim() != len(lead) + 1 or tensor.shape[:-1] != lead:
        raise ValueError(
            f"{name} must have shape [{', '.join(map(str, lead))}, {last}] "
            f"(labels give the leading sizes), got {list(tensor.shape)}"
        )


@dataclass(frozen=True)
class Layout:
    """Which target each row scores, and which sequence it belongs to."""

    targets: Tensor  # [R, T] int64, `ignore_index` where nothing is scored
    cu_seqlens: Tensor | None  # [S + 1] when packed
    sequences: int  # S
    ignore_index: int
    shift: bool
    lengths: tuple[int, ...] | None = None  # scored rows of each sequence, where the host knows

    @staticmethod
    def of(
        labels: object,
        cu_seqlens: object | None,
        *,
        shift: bool,
        ignore_index: int,
        V: int,
        scored: Scored | None = None,
    ) -> Layout:
        """From the public arguments, checked: labels [S, T], or [N] with cu_seqlens [S + 1]."""
        labels = checks.integer("labels", labels)
        packed = cu_seqlens is not None
        if labels.dim() != (1 if packed else 2):
            wanted = "[N] with cu_seqlens" if packed else "[rows, T] (or [N] with cu_seqlens=)"
            raise ValueError(f"labels must have shape {wanted}, got {list(labels.shape)}")
        # Shapes before values: labels of other logits are often out of their range too.
        if scored is not None:
            _check_rows(scored.name, scored.rows, labels.shape, scored.last)
        S = labels.shape[0]
        if checks.readable(labels) and eager(labels):
            if not packed and labels.is_contiguous() and usable("cpu"):
                # One call, where a small batch costs what its calls cost.
                made = load("cpu").targets_of(labels, V, ignore_index, shift)
                if made is not None:
                    return Layout(made[0], None, S, ignore_index, shift, made[1])
            checks.labels_in_range(labels, V, ignore_index)
        if not packed:
            targets = labels
            if shift and labels.shape[1]:
                # One op: the first label cut off, one that is not scored appended.
                targets = torch.constant_pad_nd(labels, (-1, 1), ignore_index)
            return Layout(targets, None, S, ignore_index, shift)
        N = S
        cu = checks.cu_seqlens_of(cu_seqlens, N, labels)
        targets = labels
        if shift and N:
            targets = labels.roll(-1)
            last = (cu[1:].to(torch.int64) - 1).clamp(0, N - 1)
            # An empty sequence at the front would name row 0 as its last row: it names its own
            # neighbour's last row (N - 1, never scored under shift) instead.
            last = torch.where(cu[1:] == 0, N - 1, last)
            targets = targets.index_fill(0, last, ignore_index)
        return Layout(targets.unsqueeze(0), cu, cu.numel() - 1, ignore_index, shift)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def rows(self, name: str, value: object, last: str) -> Tensor:
        """`value` [S, T, last] or packed [N, last] as [R, T, last], without a copy."""
        tensor = checks.floating(name, value)
        _check_rows(
            name, tensor, self.targets.shape[1:] if self.packed else self.targets.shape, last
        )
        return self.of_rows(name, tensor)

    def of_rows(self, name: str, tensor: Tensor) -> Tensor:
        """Likewise of what labels are of (`Scored`), whose shape is checked."""
        checks.same_device(name, tensor, "labels", self.targets)
        return tensor.unsqueeze(0) if self.packed else tensor

    def on(self, device: torch.device, scored_lengths: object = None) -> Layout:
        """On `device`, with the scored rows of each sequence where the host can know them.

        It knows them from `scored_lengths` [S] (integers, as a CPU tensor or a sequence), or by
        counting targets that lie on the CPU. Those are moved to `device`; others must be there.
        """
        lengths = self.lengths
        if lengths is not None and scored_lengths is None and device == self.targets.device:
            return self
        readable = lengths is not None or checks.readable(self.targets)
        if readable and lengths is None:
            lengths = tuple(self.scored_counts().tolist())
        if scored_lengths is not None:
            given = checks.lengths_of("scored_lengths", scored_lengths, self.sequences)
            if not readable:
                lengths = given
            elif given != lengths and given is not None and lengths is not None:
                i = next(i for i, n in enumerate(lengths) if given[i] != n)
                raise ValueError(
                    f"scored_lengths must count the scored labels: sequence {i} has {lengths[i]}, "
                    f"got {given[i]}"
                )
        targets, cu = self.targets, self.cu_seqlens
        if targets.device.type == "cpu" and device.type != "cpu":
            move = to_device if readable else Tensor.to
            targets, cu = move(targets, device), None if cu is None else move(cu, device)
        elif lengths is self.lengths:
            return self
        # Not `replace`: dynamo of torch 2.6 cannot trace it.
        return Layout(targets, cu, self.sequences, self.ignore_index, self.shift, lengths)

    @property
    def count(self) -> int | None:
        """Scored rows in all, where the host knows."""
        return None if self.lengths is None else sum(self.lengths)

    def scored_lengths(self) -> list[int]:
        """Scored rows of each sequence; on a GPU the host waits for them unless it knows."""
        return self.scored_counts().tolist() if self.lengths is None else list(self.lengths)

    def scored_counts(self) -> Tensor:
        """[S] scored rows of each sequence."""
        scored = self.targets != self.ignore_index
        if self.cu_seqlens is None:
            return scored.sum(-1)
        before = torch.nn.functional.pad(scored[0].cumsum(0), (1, 0))
        return before[self.cu_seqlens.to(torch.int64)].diff()

    def without_common_prefix(self, states: Tensor | None = None) -> Layout:
        """Pairs (sequences i and i + S/2) without the targets that both start with.

        Two rows see the same context only while every row before them was scored and alike: a hole
        between scored rows (a tool's output, say) ends the common start. What is not scored, the
        prompt, cannot be seen in labels: `states` [R, T, D], hidden states or logits, tell whether
        the first row of both saw the same. Rounding moves a state by a few per cent at most (a
        batch's shape, bf16), another prompt by its own size. What all elements have in common says
        nothing of a context: logits may lie anywhere.
        """
        flat = self.targets.reshape(-1)
        scored = flat != self.ignore_index
        counts = self.scored_counts()
        S = counts.shape[0]
        before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))[:-1]
        order = (~scored).to(torch.uint8).argsort(stable=True)  # scored rows first, in order
        place = torch.arange(flat.shape[0], device=flat.device)
        sequence = torch.searchsorted(before + counts, place, right=True).clamp(max=S - 1)
        rank = place - before[sequence]
        other = (sequence + S // 2) % S
        partner = order[(before[other] + rank).clamp(max=max(flat.shape[0] - 1, 0))]
        gap = order - order[before[sequence].clamp(max=max(flat.shape[0] - 1, 0))] != rank
        # A gap in the partner ends the run as well: seen from its own side, at the same rank.
        gap = gap | gap[(before[other] + rank).clamp(max=max(flat.shape[0] - 1, 0))]
        if states is not None and flat.shape[0]:
            first = order[before.clamp(max=flat.shape[0] - 1)]  # [S] its first scored row
            T = self.targets.shape[1]
            mine = states.detach()[first // T, first % T].float()
            mine = mine - mine.mean(-1, keepdim=True)
            size, apart = mine.norm(dim=-1), (mine - mine.roll(S // 2, 0)).norm(dim=-1)
            # Not `>`: a NaN, as logits of -inf leave it, shows nothing.
            same = apart <= SAME_CONTEXT * torch.maximum(size, size.roll(S // 2, 0))
            gap = gap | ~same[sequence]
        differs = gap | (rank >= counts[other]) | (flat[order] != flat[partner])
        seen = differs.to(torch.int64).cumsum(0)
        start = torch.nn.functional.pad(seen, (1, 0))[before[sequence]]
        common = scored[order] & (seen == start)
        dropped = torch.zeros_like(scored).scatter(0, order, common)
        targets = flat.masked_fill(dropped, self.ignore_index).view_as(self.targets)
        layout = replace(self, targets=targets, lengths=None)
        return layout if self.lengths is None else layout.on(targets.device)

    def per_token(self, values: Tensor) -> Tensor:
        """Row values [R, T] in the shape users see: [N] packed, [S, T - 1] shifted, [S, T]."""
        if self.packed:
            return values[0]
        return values[:, :-1] if self.shift else values

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one value a token, as users see it (`per_token`)."""
        R, T = self.targets.shape
        return (T,) if self.packed else (R, max(T - 1, 0) if self.shift else T)

    def from_per_token(self, name: str, values: Tensor) -> Tensor:
        """The inverse of `per_token`: [R, T]."""
        checks.shape(name, values, self.shape, "one value a token")
        if self.packed:
            return values.unsqueeze(0)
        return torch.nn.functional.pad(values, (0, 1)) if self.shift else values
