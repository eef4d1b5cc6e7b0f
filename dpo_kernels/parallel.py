"""A head whose vocabulary is sharded over the ranks of a process group.

    shards = dk.parallel.vocab_parallel(group, rows=weight.shape[0])
    out = dk.fused_linear_dpo_loss(hidden, weight, labels, vocab_group=shards, ...)

Every rank of the group has the same batch: the same hidden states, labels, reference and options.
`weight` [rows, H], `bias` [rows], the B of an adapter [rows, r] and `ref_weight` are the rank's own
rows; the ranks' rows, in rank order, are the vocabulary. Every rank gets the whole loss, the
gradients of its own rows, and the whole gradient of what all have (hidden states, the A of an
adapter, options). No logits and no weight are gathered: docs/parallel.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .backends.vocab_shards import VocabShards
from .inputs import checks

__all__ = ["VocabShards", "vocab_parallel"]

_LARGEST = 256  # calls of different options that are kept


def vocab_parallel(group: Any, rows: int, *, vocab: int | None = None) -> VocabShards:
    """The shards of `group`, of which this rank holds `rows` rows; every rank calls this.

    The ranks may hold different numbers of rows, none included. `vocab`: how many there are in all,
    if that is to be checked.

    Raises:
        TypeError, ValueError: no process group that this rank belongs to; or, on every rank, rows
            that do not add up to `vocab`, with the rows of each rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "vocab_group needs torch.distributed: call torch.distributed.init_process_group first"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "vocab_group must be a torch.distributed.ProcessGroup or what vocab_parallel gives, "
            f"got {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in vocab_group")
    # A wrong number on one rank is told on all: the others would wait for it.
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (rows, vocab), group=group)
    for i, (n, V) in enumerate(found):
        checks.whole(f"rows (on rank {i} of vocab_group)", n)
        if V is not None:
            checks.whole(f"vocab (on rank {i} of vocab_group)", V)
    sizes = [n for n, _ in found]
    told = ", ".join(f"rank {i} has {n}" for i, n in enumerate(sizes))
    for V in sorted({V for _, V in found if V is not None}):
        if sum(sizes) != V:
            raise ValueError(
                f"the shards must have the {V} rows of the vocabulary, got {sum(sizes)}: {told}"
            )
    if not sum(sizes):
        raise ValueError(f"the shards must have rows of the vocabulary, got none: {told}")
    return VocabShards(group, sizes)


# Kept with the group, which is not made anew while it is kept.
shards_of = functools.lru_cache(maxsize=64)(vocab_parallel)


def replicated(shards: VocabShards, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, which all ranks have; their gradients are the sums over the ranks.

    One node of the graph for all of them: the ranks reduce in one order.
    """
    given = [x for x in tensors if x is not None and x.requires_grad]
    if not given or not torch.is_grad_enabled():
        return tensors
    seen = iter(_Replicated.apply(shards, *given))
    return tuple(x if x is None or not x.requires_grad else next(seen) for x in tensors)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards, *tensors):
        ctx.shards = shards
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, *(None if g is None else _summed(ctx.shards, g) for g in grads)


def _summed(shards: VocabShards, g: Tensor) -> Tensor:
    """The sum of `g` over the ranks; narrow ones are added in fp32 and rounded once."""
    wide = torch.promote_types(g.dtype, torch.float32)
    total = g.to(wide, copy=True, memory_format=torch.contiguous_format)
    return shards.all_reduce(total).to(g.dtype)


def agree(
    shards: VocabShards,
    options: dict[str, str],
    batch: Callable[[], dict[str, str]],
    problem: str = "",
) -> None:
    """`ValueError`, on all ranks and by name, where they were called with different arguments, or
    where there is a `problem` on one.

    Looked at once for the same `options`: then those of the `batch` are compared as well. Ranks
    that part later than at their first call are not seen: they wait for each other, up to the
    timeout of the process group.
    """
    key = tuple(options.items())
    if key in shards.agreed:
        if problem:
            raise ValueError(f"rank {shards.rank} of vocab_group: {problem}")
        return
    found: list[Any] = [None] * len(shards.sizes)
    dist.all_gather_object(found, (problem, {**options, **batch()}), group=shards.group)
    for i, (wrong, _) in enumerate(found):
        if wrong:
            raise ValueError(f"rank {i} of vocab_group: {wrong}")
    facts = [own for _, own in found]
    for name in dict.fromkeys(name for own in facts for name in own):
        told = [own.get(name, "nothing") for own in facts]
        for i, value in enumerate(told):
            if value != told[0]:
                raise ValueError(
                    f"{name} must be the same on all ranks of vocab_group, got {told[0]} on rank 0 "
                    f"and {value} on rank {i}. (Weights that FSDP shards are not sharded by "
                    "vocabulary: its ranks have batches of their own.)"
                )
    if len(shards.agreed) >= _LARGEST:
        shards.agreed.clear()  # on all ranks at the same call
    shards.agreed.add(key)
