"""One optimizer step over the ranks: who takes which pairs, and what all of them know behind it.

A step is a list of pairs, whatever the number of ranks. Each takes its share, divided by tokens,
and runs as many forwards and backwards as the rank that has most: sharded weights are gathered in
each of them, by all. What a step found (loss, tokens, signals, rewards and log-probs of every pair)
is summed in one reduction.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import TokenRow
from ..models.attached import HeadOutput
from .model import Policy
from .ranks import Ranks, divided

_SIGNALS = tuple(
    int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def tokens_of(row: TokenRow) -> int:
    """What a row weighs where work is divided."""
    return row.size


@dataclass(frozen=True)
class Parts:
    """This rank's batches of a step, and how many forwards all ranks make."""

    batches: list[list[int]]
    rounds: int
    items: list[int]  # of this rank

    @classmethod
    def of(
        cls,
        ranks: Ranks,
        items: Sequence[int],
        size: Callable[[int], int],
        batches: Callable[[list[int]], list[list[int]]],
    ) -> Parts:
        """`items` divided over the ranks by `size`, each part cut by `batches`."""
        if ranks.data_world == 1:
            whole = batches(list(items)) if items else []
            return cls(whole, len(whole), list(items))
        shares = divided([size(i) for i in items], ranks.data_world)
        held = [[items[at] for at in share] for share in shares]
        cut = [batches(own) if own else [] for own in held]
        return cls(cut[ranks.data_rank], max(map(len, cut)), held[ranks.data_rank])

    @classmethod
    def whole_batches(
        cls, ranks: Ranks, batches: Sequence[Sequence[int]], size: Callable[[int], int]
    ) -> Parts:
        """Batches that stay as they are, divided over the ranks."""
        if ranks.data_world == 1:
            every = [list(batch) for batch in batches]
            return cls(every, len(every), [i for batch in every for i in batch])
        shares = divided([sum(map(size, batch)) for batch in batches], ranks.data_world)
        mine = [list(batches[at]) for at in shares[ranks.data_rank]]
        return cls(mine, max(map(len, shares)), [i for batch in mine for i in batch])

    def __iter__(self) -> Iterator[list[int] | None]:
        """A batch a round; None where the others have one and this rank has not."""
        for k in range(self.rounds):
            yield self.batches[k] if k < len(self.batches) else None


def idle(policy: Policy, logps: Callable[[], Tensor]) -> None:
    """A forward, and a backward of zeros, where other ranks have a batch and this one has none."""
    if not policy.sharded.is_sharded:
        return
    total = logps().sum()
    if total.requires_grad:
        (total * 0.0).backward()


def idle_pair(policy: Policy, pair: TokenRow) -> None:
    idle(policy, lambda: policy.logps(policy.batch([pair])))


class Table:
    """Numbers that ranks find of their parts, summed over all of them at once.

    `values` [rows, n]: of each of n items, by the rank that had it; and plain sums by name.
    `unpaired`: the items are single completions.
    """

    def __init__(
        self, ranks: Ranks, device: torch.device, rows: int, n: int, unpaired: bool = False
    ) -> None:
        self.ranks, self.unpaired = ranks, unpaired
        self.values = torch.zeros(rows, n, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.dtype = torch.float32
        self.own: list[int] = []  # places that this rank has put
        self.numbers: dict[str, Any] = {}
        self.totals: dict[str, float] = {}

    def blame(self) -> str:
        """The ranks that put numbers which are not finite; they tell each other."""
        mine = self.values[:, self.own] if self.own else self.values[:, :0]
        every = self.ranks.objects(not bool(mine.isfinite().all()))
        found = [str(rank) for rank, bad in enumerate(every) if bad]
        if not found:
            return " (the log-probs of every rank are finite: it came in the backward)"
        return f" (log-probs of rank {', '.join(found)})"

    def put(self, places: Sequence[int], *rows: Tensor) -> None:
        at = torch.tensor(list(places), device=self.values.device)
        self.own += places
        self.values[:, at] = torch.stack([r.detach().double() for r in rows])

    def put_out(self, places: Sequence[int], out: HeadOutput) -> None:
        """Rewards and log-probs of the items at `places`, and their share of the loss."""
        assert out.rewards is not None and out.loss is not None
        if self.unpaired:
            assert out.logps is not None and out.desirable is not None and out.kl is not None
            kl = out.kl.expand(len(out.rewards))
            self.put(places, out.rewards, out.logps, out.desirable, kl)
        else:
            assert out.pair_logps is not None
            self.put(places, *out.rewards, *out.pair_logps)
        self.loss += out.loss.detach().double()
        self.dtype = out.rewards.dtype

    def add(self, name: str, value: float | Tensor) -> None:
        self.numbers[name] = self.numbers.get(name, 0.0) + value

    def reduce(self) -> None:
        """All of it is of all ranks from here on."""
        device = self.values.device
        wide = float(self.dtype == torch.float64)
        numbers = [self.loss, *self.numbers.values(), wide]
        head = torch.stack([torch.as_tensor(x, dtype=torch.float64).to(device) for x in numbers])
        packed = self.ranks.sum(torch.cat([head, self.values.flatten()]))
        # Ranks that share a head have the same numbers, but for a signal that one of them was sent.
        self.ranks.any(packed[: len(head)])
        totals = packed[1 : len(head)].tolist()
        self.totals = dict(zip(self.numbers, totals, strict=False))
        self.dtype = torch.float64 if totals[-1] else torch.float32  # a rank may have had nothing
        self.loss = packed[0]
        self.values = packed[len(head) :].view(self.values.shape)

    def out(self) -> HeadOutput:
        """What `put_out` put, of all items."""
        values = self.values.to(self.dtype)
        if self.unpaired:
            return HeadOutput(
                loss=self.loss,
                rewards=values[0],
                logps=values[1],
                desirable=values[2] > 0,
                kl=values[3, 0],
            )
        return HeadOutput(loss=self.loss, rewards=values[:2], pair_logps=values[2:4])


def agreed_signal(policy: Policy, number: int | None) -> int | None:
    """The signal that any rank was sent, this one's being `number`."""
    if not policy.ranks.many:
        return None
    table = Table(policy.ranks, policy.device, 0, 0)
    add_signal(table, number)
    table.reduce()
    return signal_of(table)


def add_signal(table: Table, number: int | None) -> None:
    """Put a signal that this rank was sent among the numbers of a step."""
    for known in _SIGNALS:
        table.add(f"signal {known}", float(known == number))


def signal_of(table: Table) -> int | None:
    """The signal that any rank was sent."""
    return next((n for n in _SIGNALS if table.totals.get(f"signal {n}")), None)
