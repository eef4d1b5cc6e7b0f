"""The row kernels of a backend over logits whose vocabulary is sharded over ranks.

Each rank has the logits of its own rows of the vocabulary. Its backend reads them as if they were
all; what it finds is combined exactly, in fp64:

    log-sum-exp   m = max over ranks of lse_l (one all-reduce), w_l = exp(lse_l - m),
                  lse = m + log sum w_l (the other all-reduce, which brings all below too)
    log-prob      the target's logit, from the rank that owns it, less lse
    entropy       sum w_l (H_l - (lse_l - m)) / sum w_l + log sum w_l
    KL            sum v_l (KL_l + (ref_lse_l - ref_m) - (lse_l - m)) / sum v_l
                  + log sum w_l - log sum v_l,    v_l = exp(ref_lse_l - ref_m)

The numbers sent are a few a row of logits, whatever V is. In the backward nothing is sent: softmax
needs the log-sum-exp alone. A rank that does not own a row's target gives its kernel some column of
its own instead, and writes that column's gradient itself afterwards.

Letters: `R` rows, `T` positions, `V` columns of this rank, `n` = R T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..inputs.transform import LogitTransform
from .torch import accumulate_dtype

_IGNORED, _ILLEGAL = -1, -2  # targets that no shard owns


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


class ShardedRows:
    """A backend whose functions of logits combine the ranks; the other functions are its own."""

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

    def _of_target(self, logits: Tensor, place: _Place, transform: LogitTransform) -> Tensor:
        """[R, T] fp64 z of the target where this rank owns it, else 0."""
        if not self.shards.rows:
            return torch.zeros(place.mine.shape, dtype=torch.float64, device=logits.device)
        z = transform(logits.gather(-1, place.column).squeeze(-1).double())
        return torch.where(place.mine, z, 0.0)

    def _largest(self, lse: Tensor) -> Tensor:
        """The largest over the ranks, in place of which 0 stands where it is not finite."""
        # NaN has no place in a maximum: it comes with the sum.
        top = torch.where(lse.isnan(), -float("inf"), lse)
        top = self.shards.all_reduce(top.contiguous(), dist.ReduceOp.MAX)
        return torch.where(top.isfinite(), top, 0.0)

    def token_logps(
        self,
        logits: Tensor,  # [R, T, V]
        targets: Tensor,  # [R, T], of the whole vocabulary
        ignore_index: int,
        transform: LogitTransform,
        stats: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `backends.torch.token_logps` of the logits of all ranks; None without statistics."""
        place, wide = self._place(targets, ignore_index), accumulate_dtype(logits.dtype)
        lse = torch.full(targets.shape, -float("inf"), dtype=torch.float64, device=logits.device)
        table: Any = lse.new_zeros((len(stats), *targets.shape))
        if self.shards.rows:
            _, lse, table = self.inner.token_logps(logits, place.kernel, _IGNORED, transform, stats)
        local = {stat: table[i].double() for i, stat in enumerate(stats)}
        top = self._largest(lse)
        below = lse - top
        w = below.exp()
        sent = [w, self._of_target(logits, place, transform)]
        for stat, x in local.items():
            sent.append(self._share(stat, x, logits, place, transform, below, w))
        total, z, *rest = self.shards.all_reduce(torch.stack(sent)).unbind(0)
        log_total = total.log()
        lse = top + log_total
        logps = torch.where(place.legal, z - lse, float("nan"))
        columns = []
        for stat, x in zip(local, rest, strict=True):
            if stat == "entropy":
                x = x / total + log_total
            elif stat == "log_sum_sq_probs":
                x = x.log() - 2 * log_total
            columns.append(torch.where(logps.isnan(), logps, x))
        logps, lse, *columns = (torch.where(place.scored, x, 0.0) for x in (logps, lse, *columns))
        return logps.to(wide), lse, torch.stack(columns).to(wide) if columns else None

    def _share(
        self,
        stat: str,
        x: Tensor,  # [R, T] fp64, of this rank's logits alone
        logits: Tensor,
        place: _Place,
        transform: LogitTransform,
        below: Tensor,
        w: Tensor,
    ) -> Tensor:
        """What this rank adds to a statistic; the sum over the ranks gives it (`token_logps`)."""
        if stat == "mean_logits":
            return x * (self.shards.rows / self.shards.vocab)
        if stat == "is_top1":
            return torch.where(place.mine & self._has_first(logits, transform), x, 0.0)
        if stat == "entropy":
            share = w * (x - below)
        elif stat == "log_sum_sq_probs":
            share = (2 * below + x).exp()
        else:
            raise AssertionError(stat)
        return torch.where(below == -float("inf"), 0.0, share)  # nothing here has a probability

    def _has_first(self, logits: Tensor, transform: LogitTransform) -> Tensor:
        """[R, T] whether the first of the largest z of all ranks is on this one."""
        none = -float("inf")
        top = torch.full(logits.shape[:-1], none, dtype=torch.float64, device=logits.device)
        if self.shards.rows:
            x = logits.amin(-1) if transform.scale < 0 else logits.amax(-1)
            top = transform(x.to(accumulate_dtype(x.dtype))).double()
            top = torch.where(top.isnan(), none, top)
        largest = self.shards.all_reduce(top.clone(), dist.ReduceOp.MAX)
        mine = torch.where(
            (top == largest) & (self.shards.rows > 0), -float(self.shards.rank), none
        )
        first = self.shards.all_reduce(mine.clone(), dist.ReduceOp.MAX)
        return (mine == first) & (mine != none)

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

    def token_kl(
        self,
        logits: Tensor,  # [R, T, V]
        ref_logits: Tensor,  # [R, T, V]
        targets: Tensor,  # [R, T]
        ignore_index: int,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `backends.torch.token_kl` of the logits of all ranks."""
        place = self._place(targets, ignore_index)
        dtype = torch.promote_types(*(accumulate_dtype(x.dtype) for x in (logits, ref_logits)))
        lse = torch.full(targets.shape, -float("inf"), dtype=torch.float64, device=logits.device)
        ref_lse, kl = lse, torch.zeros_like(lse)
        if self.shards.rows:
            given = (logits, ref_logits, place.kernel, _IGNORED, transform)
            _, lse, _, ref_lse, kl = self.inner.token_kl(*given)
        both = torch.stack([lse, ref_lse])
        top = self._largest(both)
        below = both - top
        w, infinite = below.exp(), float("inf")
        content = kl.double() + below[1] - below[0]
        # A part too small for a number still counts if only the policy rules it out.
        share = torch.where(content == infinite, infinite, w[1] * content)
        share = torch.where(ref_lse == -infinite, 0.0, share)
        logits_of_target = [self._of_target(x, place, transform) for x in (logits, ref_logits)]
        sent = torch.stack([*w, *logits_of_target, share])
        total = self.shards.all_reduce(sent)
        log_total = total[:2].log()
        lse, ref_lse = top + log_total
        logps = torch.where(place.legal, total[2] - lse, float("nan"))
        ref_logps = torch.where(place.legal, total[3] - ref_lse, float("nan"))
        kl = total[4] / total[1] - (log_total[1] - log_total[0])
        kl = torch.where(logps.isnan(), logps, kl)
        found = (torch.where(place.scored, x, 0.0) for x in (logps, lse, ref_logps, ref_lse, kl))
        logps, lse, ref_logps, ref_lse, kl = found
        return logps.to(dtype), lse, ref_logps.to(dtype), ref_lse, kl.to(dtype)

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


def _mend(out: Tensor, place: _Place, d: Tensor) -> None:
    """`d` [R, T] into the column that stood for a target of another rank."""
    foreign = (place.scored & place.legal & ~place.mine).unsqueeze(-1)
    kept = out.gather(-1, place.column)
    out.scatter_(-1, place.column, torch.where(foreign, d.unsqueeze(-1).to(out.dtype), kept))
