"""The row kernels of a backend over logits whose vocabulary is sharded over ranks.

Each rank has the logits of its own rows of the vocabulary. Its backend reads them as if they were
all; what it finds is combined exactly, in fp64:

    log-sum-exp   m = max over ranks of lse_l (one all-reduce), w_l = exp(lse_l - m),
                  lse = m + log sum w_l (the other all-reduce, which brings all below too)
    log-prob      the target's logit, from the rank that owns it, less lse
    entropy       sum w_l (H_l - (lse_l - m)) / sum w_l + log sum w_l
    KL            sum v_l (KL_l + (ref_lse_l - ref_m) - (lse_l - m)) / sum v_l
                  + log sum w_l - log sum v_l,    v_l = exp(ref_lse_l - ref_m)

The numbers sent are a few a row of logits, whatever V is; where no gradient has to be formed at
once, those of all chunks go together (`local`, then `combined`). In the backward nothing is sent:
softmax needs the log-sum-exp alone. A rank that does not own a row's target gives its kernel some
column of its own instead, and writes that column's gradient itself afterwards.

Letters: `R` rows, `T` positions, `V` columns of this rank, `n` = R T.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..inputs.transform import LogitTransform
from .torch import accumulate_dtype

_IGNORED, _ILLEGAL = -1, -2  # targets that no shard owns
_NONE = -float("inf")


class VocabShards:
    """Which rows of the vocabulary each rank of a process group holds: contiguous, in rank order.

    `sizes` rows of each rank; `start`, `stop` those of this one; `vocab` all of them.
    """

    def __init__(self, group: Any, sizes: Sequence[int]) -> None:
        self.group, self.sizes = group, tuple(sizes)
        self.rank = dist.get_rank(group)
        self.vocab, self.widest = sum(self.sizes), max(self.sizes)
        self.rows = self.sizes[self.rank]
        self.start = sum(self.sizes[: self.rank])
        self.stop = self.start + self.rows
        self.names: dict[str, str] = {}  # of backends over these shards
        self.agreed: set[Any] = set()  # calls whose options were seen to be the same on all ranks

    def __repr__(self) -> str:
        return f"VocabShards(rank {self.rank}: rows {self.start}..{self.stop} of {self.vocab})"

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """`x`, contiguous, with the values of all ranks combined in place."""
        if len(self.sizes) > 1 and x.numel():
            dist.all_reduce(x, op=op, group=self.group)
        return x


class _Place(NamedTuple):
    """Where the targets of rows [R, T] are, seen from one shard."""

    scored: Tensor
    legal: Tensor
    mine: Tensor
    column: Tensor  # [R, T, 1] of this shard: the target's, or any
    kernel: Tensor  # what the kernel gets as targets


class Part(NamedTuple):
    """What one rank has of rows [R, T] (`ShardedRows.local`); m = 2 beside a reference, else 1."""

    lse: Tensor  # [m, R, T] fp64, of its own columns; -inf without any
    z: Tensor  # [m, R, T] fp64 of the target, 0 where another rank owns it
    kl: Tensor  # [R, T] fp64, of its own columns alone
    top: Tensor  # [R, T] fp64 the largest z
    table: Tensor | None  # [statistics, R, T] fp64
    dtype: torch.dtype  # of the log-probs

    @staticmethod
    def joined(parts: list[Part]) -> Part:
        """Of the rows of all, one after the other in T."""
        lse, z, kl, top = (torch.cat(x, -1) for x in list(zip(*parts, strict=True))[:4])
        tables = [part.table for part in parts if part.table is not None]
        return Part(lse, z, kl, top, torch.cat(tables, -1) if tables else None, parts[0].dtype)


class ShardedRows:
    """A backend whose functions of logits combine the ranks; the other functions are its own."""

    # One call from logits to the loss would leave the other ranks out.
    ordinary_rows = ordinary_rows_backward = ordinary_streamed = None

    def __init__(self, inner: Any, shards: VocabShards) -> None:
        self.inner, self.shards = inner, shards

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _place(self, targets: Tensor, ignore_index: int) -> _Place:
        s = self.shards
        scored = targets != ignore_index
        legal = (targets >= 0) & (targets < s.vocab)
        mine = scored & (targets >= s.start) & (targets < s.stop)
        column = (targets - s.start).clamp(0, max(s.rows - 1, 0))
        kernel = torch.where(scored, torch.where(legal, column, _ILLEGAL), _IGNORED)
        return _Place(scored, legal, mine, column.unsqueeze(-1), kernel)

    def token_logps(
        self,
        logits: Tensor,  # [R, T, V]
        targets: Tensor,  # [R, T], of the whole vocabulary
        ignore_index: int,
        transform: LogitTransform,
        stats: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `backends.torch.token_logps` of the logits of all ranks; None without statistics."""
        part = self.local(logits, None, targets, ignore_index, transform, stats)
        return self.combined([part], targets, ignore_index, stats)[:3]

    def token_kl(
        self,
        logits: Tensor,  # [R, T, V]
        ref_logits: Tensor,  # [R, T, V]
        targets: Tensor,  # [R, T]
        ignore_index: int,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `backends.torch.token_kl` of the logits of all ranks."""
        part = self.local(logits, ref_logits, targets, ignore_index, transform, ())
        logps, lse, _, *rest = self.combined([part], targets, ignore_index, ())
        return logps, lse, *rest  # type: ignore[return-value]

    def local(
        self,
        logits: Tensor,  # [R, T, V]
        ref_logits: Tensor | None,  # [R, T, V]
        targets: Tensor,  # [R, T]
        ignore_index: int,
        transform: LogitTransform,
        stats: tuple[str, ...],
    ) -> Part:
        """What `combined` needs of these rows; nothing is sent."""
        place = self._place(targets, ignore_index)
        models = [logits] if ref_logits is None else [logits, ref_logits]
        dtype = functools.reduce(torch.promote_types, (accumulate_dtype(x.dtype) for x in models))
        lse = torch.full(
            (len(models), *targets.shape), _NONE, dtype=torch.float64, device=logits.device
        )
        z, kl, top = torch.zeros_like(lse), torch.zeros_like(lse[0]), lse[0]
        table: Any = lse.new_zeros((len(stats), *targets.shape))
        if self.shards.rows:
            given = (place.kernel, _IGNORED, transform)
            if ref_logits is None:
                _, own, table = self.inner.token_logps(logits, *given, stats)
                lse = own[None]
            else:
                _, own, _, ref_lse, kl = self.inner.token_kl(logits, ref_logits, *given)
                lse = torch.stack([own, ref_lse])
                if stats:  # by a read of their own
                    table = self.inner.token_logps(logits, *given, stats)[2]
            of_target = [transform(x.gather(-1, place.column)[..., 0].double()) for x in models]
            z = torch.where(place.mine, torch.stack(of_target), 0.0)
            if "is_top1" in stats:
                x = logits.amin(-1) if transform.scale < 0 else logits.amax(-1)
                top = transform(x.to(accumulate_dtype(x.dtype))).double()
        return Part(lse, z, kl.double(), top, table.double() if stats else None, dtype)

    def combined(
        self, parts: list[Part], targets: Tensor, ignore_index: int, stats: tuple[str, ...]
    ) -> tuple[Any, ...]:
        """logps, lse, statistics, ref_logps, ref_lse, kl of rows [R, T], from what each rank has of
        them; None for what was not asked for."""
        part = parts[0] if len(parts) == 1 else Part.joined(parts)
        place, joint = self._place(targets, ignore_index), part.lse.shape[0] == 2
        top1 = "is_top1" in stats
        # NaN has no place in a maximum: it comes with the sum.
        tops = torch.cat([part.lse, part.top[None]]) if top1 else part.lse
        tops = torch.where(tops.isnan(), _NONE, tops).contiguous()
        largest = self.shards.all_reduce(tops.clone(), dist.ReduceOp.MAX)
        top = largest[: len(part.lse)]
        top = torch.where(top.isfinite(), top, 0.0)
        below = part.lse - top
        w = below.exp()
        sent = [*w, *part.z]
        if joint:
            sent.append(_kl_share(part, below, w))
        first = self._has_first(tops[-1], largest[-1]) if top1 else None
        for i, stat in enumerate(stats):
            assert part.table is not None
            sent.append(self._share(stat, part.table[i], place, below[0], w[0], first))
        total = self.shards.all_reduce(torch.stack(sent))
        m = len(part.lse)
        log_total = total[:m].log()
        lse = top + log_total
        logps = torch.where(place.legal, total[m : 2 * m] - lse, float("nan"))
        kl = None
        if joint:
            kl = total[4] / total[1] - (log_total[1] - log_total[0])
            kl = torch.where(logps[0].isnan(), logps[0], kl)
        columns = []
        for stat, x in zip(stats, total[len(sent) - len(stats) :], strict=True):
            if stat == "entropy":
                x = x / total[0] + log_total[0]
            elif stat == "log_sum_sq_probs":
                x = x.log() - 2 * log_total[0]
            columns.append(torch.where(logps[0].isnan(), logps[0], x))

        def shown(x: Tensor | None, dtype: torch.dtype = part.dtype) -> Tensor | None:
            return None if x is None else torch.where(place.scored, x, 0.0).to(dtype)

        table = shown(torch.stack(columns)) if stats else None
        found = (shown(logps[0]), shown(lse[0], torch.float64), table)
        if not joint:
            return *found, None, None, None
        return *found, shown(logps[1]), shown(lse[1], torch.float64), shown(kl)

    def _share(
        self,
        stat: str,
        x: Tensor,  # [R, T] fp64, of this rank's logits alone
        place: _Place,
        below: Tensor,
        w: Tensor,
        first: Tensor | None,
    ) -> Tensor:
        """What this rank adds to a statistic; the sum over the ranks gives it (`combined`)."""
        if stat == "mean_logits":
            return x * (self.shards.rows / self.shards.vocab)
        if stat == "is_top1":
            assert first is not None
            return torch.where(place.mine & first, x, 0.0)
        if stat == "entropy":
            share = w * (x - below)
        elif stat == "log_sum_sq_probs":
            share = (2 * below + x).exp()
        else:
            raise AssertionError(stat)
        return torch.where(below == _NONE, 0.0, share)  # nothing here has a probability

    def _has_first(self, top: Tensor, largest: Tensor) -> Tensor:
        """[R, T] whether the first of the `largest` z of all ranks is on this one."""
        here = (top == largest) & (self.shards.rows > 0)
        rank = torch.where(here, -float(self.shards.rank), _NONE)
        first = self.shards.all_reduce(rank.clone(), dist.ReduceOp.MAX)
        return here & (rank == first)

    def token_logps_backward(
        self,
        grad: Tensor,  # [R, T]
        logits: Tensor,  # [R, T, V]
        targets: Tensor,  # [R, T]
        lse: Tensor,  # [R, T] fp64, of all ranks
        ignore_index: int,
        transform: LogitTransform,
        out: Tensor,  # [R, T, V], may be `logits`
    ) -> None:
        """As `backends.torch.token_logps_backward`, for the columns of this rank."""
        if not self.shards.rows:
            return
        place = self._place(targets, ignore_index)
        x = logits.gather(-1, place.column).squeeze(-1).double()
        d = -grad.double() * (transform(x) - lse).exp() * transform.derivative(x)
        d = torch.where(grad == 0, 0.0, d)
        self.inner.token_logps_backward(grad, logits, place.kernel, lse, _IGNORED, transform, out)
        _mend(out, place, d)

    def token_kl_backward(
        self,
        grad_logps: Tensor,  # [R, T]
        grad_kl: Tensor,  # [R, T]
        logits: Tensor,  # [R, T, V]
        ref_logits: Tensor,  # [R, T, V]
        targets: Tensor,  # [R, T]
        lse: Tensor,  # [R, T] fp64, of all ranks
        ref_lse: Tensor,  # [R, T] fp64, of all ranks
        ignore_index: int,
        transform: LogitTransform,
        out: Tensor,  # [R, T, V], may be `logits` or `ref_logits`
    ) -> None:
        """As `backends.torch.token_kl_backward`, for the columns of this rank."""
        if not self.shards.rows:
            return
        place = self._place(targets, ignore_index)
        x, r = (a.gather(-1, place.column).squeeze(-1).double() for a in (logits, ref_logits))
        p, q = (transform(x) - lse).exp(), (transform(r) - ref_lse).exp()
        d = torch.where(grad_kl == 0, 0.0, grad_kl.double() * (p - q)) - grad_logps.double() * p
        d = torch.where((grad_logps == 0) & (grad_kl == 0), 0.0, d * transform.derivative(x))
        rest = (place.kernel, lse, ref_lse, _IGNORED, transform, out)
        self.inner.token_kl_backward(grad_logps, grad_kl, logits, ref_logits, *rest)
        _mend(out, place, d)


def _kl_share(part: Part, below: Tensor, w: Tensor) -> Tensor:
    """What this rank adds to the sum that gives the KL (`ShardedRows.combined`)."""
    content = part.kl + below[1] - below[0]
    # A part too small for a number still counts if only the policy rules it out.
    share = torch.where(content == float("inf"), float("inf"), w[1] * content)
    share = torch.where(part.lse[0] == _NONE, float("inf"), share)  # all of it ruled out
    return torch.where(part.lse[1] == _NONE, 0.0, share)


def _mend(out: Tensor, place: _Place, d: Tensor) -> None:
    """`d` [R, T] into the column that stood for a target of another rank."""
    foreign = (place.scored & place.legal & ~place.mine).unsqueeze(-1)
    kept = out.gather(-1, place.column)
    out.scatter_(-1, place.column, torch.where(foreign, d.unsqueeze(-1).to(out.dtype), kept))
