"""The processes of one run: who this one is, what they divide, and what they tell each other.

    with joined(config) as ranks:           # ALONE where no launcher started several
        mine = ranks.share(sizes)           # places of this rank's part, divided by tokens
        whole = ranks.sum(part)             # of all parts
        with ranks.together():              # an error on any rank ends all of them, by its name

Ranks that share a head by vocabulary (`vocab_parallel`) have the same data: work is divided over
the groups of them, `data_world` of them, of which this rank's is `data_rank`.
"""

from __future__ import annotations

import contextlib
import heapq
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..data import DataError
from .config import UserError
from .optim import TrainingError

T = TypeVar("T")
# What is the same error on all ranks where it is one on any.
_TOLD: tuple[type[Exception], ...] = (UserError, DataError, TrainingError)


@dataclass(eq=False)
class Ranks:
    """This process among those of the run; of one process nothing is sent."""

    rank: int = 0
    world: int = 1
    data_rank: int = 0
    data_world: int = 1
    data_group: Any = None  # of the ranks whose parts make up the whole
    vocab_mesh: Any = None  # of the ranks that share a head by vocabulary
    device: torch.device | None = None
    watch: Any = None

    @property
    def many(self) -> bool:
        return self.world > 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def at(self, part: str, step: int | None = None) -> None:
        """Where this rank is, for whoever must say so when it is no more."""
        if self.watch is not None:
            self.watch.at(part, step)

    def within(self, stage: str) -> None:
        """The part of a longer run that begins here: its places and steps are named by it."""
        if self.watch is not None:
            self.watch.within(stage)

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Places of this rank's part of work of these sizes, in their order."""
        return divided(sizes, self.data_world)[self.data_rank]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the parts, in place; `x` is of the run's device."""
        if self.data_world > 1:
            dist.all_reduce(x, group=self.data_group)
        return x

    def any(self, flags: Tensor) -> Tensor:
        """What is set on any rank that shares this one's head, in place."""
        if self.vocab_mesh is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.vocab_mesh.get_group())
        return flags

    def split(self, vocab: int) -> None:
        """Every `vocab` ranks in turn share a head from here on, and the same data."""
        if vocab == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh

        assert self.device is not None
        self.data_rank, self.data_world = self.rank // vocab, self.world // vocab
        shape, names = (self.data_world, vocab), ("data", "vocab")
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.data_group, self.vocab_mesh = mesh["data"].get_group(), mesh["vocab"]

    def objects(self, mine: T) -> list[T]:
        """What each rank has to say."""
        if not self.many:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error within, on any rank, is raised on all behind it, and names the rank.

        For what the ranks do each on its own: within nothing may be waited for.
        """
        if not self.many:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        place = f"rank {self.rank}" if self.watch is None else self.watch.place
        found = self.objects(None if mine is None else (place, *_packed(mine)))
        wrong = [entry for entry in found if entry is not None]
        if not wrong:
            return
        place, kind, text = wrong[0]
        same = len(wrong) == self.world and len({text for _, _, text in wrong}) == 1
        raise agreed(_TOLD[kind](text if same else f"{place}: {text}")) from mine

    def first_does(self, action: Callable[[], T]) -> T:
        """What the first rank's `action` gives, on all; its error is theirs."""
        if not self.many:
            return action()
        told: list[Any] = [None, None]
        mine: Exception | None = None
        if self.first:
            try:
                told[0] = action()
            except Exception as error:
                mine, told[1] = error, _packed(error)
        dist.broadcast_object_list(told, 0)
        if told[1] is not None:
            kind, text = told[1]
            raise agreed(_TOLD[kind](text)) from mine
        return told[0]

    def wait(self) -> None:
        if self.many:
            dist.barrier()


ALONE = Ranks()


def agreed(error: Exception) -> Exception:
    """The error, marked as one that every rank raises at the same place."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _packed(error: Exception) -> tuple[int, str]:
    for kind, told in enumerate(_TOLD):
        if isinstance(error, told):
            return kind, str(error)
    return _TOLD.index(TrainingError), described(error)


def described(error: BaseException) -> str:
    """An error that nothing in the program foresaw, in a line: what, and where."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in first:
        return f"out of memory: {first or type(error).__name__}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return f"{type(error).__name__}: {first}{where if frames else ''}"


def divided(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Places of each part: the largest go first, each to the part that has least so far.

    The same on every rank; within a part places keep their order.
    """
    if parts == 1:
        return [list(range(len(sizes)))]
    loads = [(0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, part = heapq.heappop(loads)
        found[part].append(i)
        heapq.heappush(loads, (load + sizes[i], part))
    return [sorted(part) for part in found]
