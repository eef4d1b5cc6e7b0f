"""What was asked of a server and paid for, by all processes of a run and those before it.

A budget is taken before a request is sent and settled when its price is known, so that it holds
with requests in flight. Of many ranks the sums are in the store of their process group, where they
are compared and swapped: the budgets are those of all.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from ..train.ranks import ALONE, Ranks
from .records import Journal
from .settings import EndpointOptions

_numbers = itertools.count()  # of the purses of a process: the ranks make the same ones


class Purse:
    """Requests and their cost, within `max_requests` and `max_cost`."""

    def __init__(self, ledger: Path | None, ranks: Ranks = ALONE) -> None:
        """`ledger`: a file in which what was spent is kept, so that a budget outlives a process."""
        self._ledger = Journal(ledger, ranks) if ledger else None
        rows = self._ledger.rows if self._ledger else []
        self._sent = sum(row.get("sent", 1) for row in rows)
        self.before = self._committed = sum(row["cost"] for row in rows)
        self.spent = 0.0  # by this process
        self._store = ranks.watch.store if ranks.many else None
        self._key = f"purse/{next(_numbers)}"
        self._rank, self._writes = ranks.rank, 0

    def take(self, options: EndpointOptions, reserve: float) -> str:
        """Set `reserve` aside for one request; why not, where a budget is spent."""
        while True:
            seen, sent, committed = self._now()
            if options.max_requests is not None and sent >= options.max_requests:
                return f"budget: max_requests={options.max_requests} is spent"
            if options.max_cost is not None and committed + reserve > options.max_cost:
                return f"budget: max_cost={options.max_cost:g} is spent"
            if self._put(seen, sent + 1, committed + reserve):
                break
        if self._ledger:  # before it is sent: a process that is killed has spent it
            self._ledger.add([{"sent": 1, "cost": reserve}])
        return ""

    def settle(self, reserve: float, cost: float) -> None:
        """A request that `reserve` was set aside for has cost `cost`."""
        self.spent += cost
        while True:
            seen, sent, committed = self._now()
            if self._put(seen, sent, committed + (cost - reserve)):
                break
        if self._ledger and cost != reserve:
            self._ledger.add([{"sent": 0, "cost": cost - reserve}])

    def _now(self) -> tuple[str, int, float]:
        """(what the store holds, requests sent, cost paid and set aside)"""
        if self._store is None:
            return "", self._sent, self._committed
        seen = ""
        if self._store.check([self._key]):
            seen = self._store.get(self._key).decode()
        values: Any = json.loads(seen) if seen else (self._sent, self._committed)
        return seen, int(values[0]), float(values[1])

    def _put(self, seen: str, sent: int, committed: float) -> bool:
        """Whether nobody else has changed what was `seen`."""
        if self._store is None:
            self._sent, self._committed = sent, committed
            return True
        # No two values are the same text: each names its writer and how often that has written.
        self._writes += 1
        text = json.dumps([sent, committed, self._rank, self._writes])
        return self._store.compare_set(self._key, seen, text).decode() == text
