"""The heads of a call whose vocabulary is sharded over ranks: this rank's own rows of them."""

from __future__ import annotations

import hashlib
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parallel import VocabShards, agree, replicated, shards_of
from . import checks

_OF_THE_BATCH = ("num_pairs", "num_chosen_tokens")  # options that are new with each batch


class GivenHead(NamedTuple):
    """The public arguments of a policy's or a reference's head."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None


def own_rows(
    vocab_group: Any,
    policy: GivenHead,
    reference: GivenHead,
    options: tuple[dict[str, Any], dict[str, Any]],
    batch: dict[str, Any],
) -> tuple[VocabShards | None, GivenHead, GivenHead]:
    """The shards, None where the heads are whole, and the heads as this rank has them.

    The ranks must have been given the same `options` and, beside the heads, the same `batch`.
    """
    group = _group_of(vocab_group, policy.weight)
    if group is None:
        return None, policy, reference
    given = {**options[0], **options[1]}
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "vocab_group: the collectives of a sharded head do not trace; call this outside "
            "torch.compile (torch.compiler.disable)"
        )
    policy, reference = (_local(*head) for head in ((policy, ""), (reference, "ref_")))
    weight = checks.floating("weight", policy.weight)
    rows = weight.shape[0] if weight.dim() else 0
    shards = group if isinstance(group, VocabShards) else shards_of(group, rows)
    problem = ""
    if rows != shards.rows:
        problem = (
            f"weight must have the {shards.rows} rows {shards.start} to {shards.stop} of the "
            f"vocabulary of {shards.vocab}, got {list(weight.shape)}"
        )
    tensors = {"hidden": policy.hidden, "ref_hidden": reference.hidden, **batch}
    tensors |= {n: x for n, x in given.items() if isinstance(x, Tensor) or n in _OF_THE_BATCH}
    facts = {name: _told(x) for name, x in given.items() if name not in _OF_THE_BATCH}
    facts["gradients"] = str(torch.is_grad_enabled())
    for prefix, head in (("", policy), ("ref_", reference)):
        parts = zip(("lora A", "lora B", "lora scaling"), head.lora or (None,) * 3, strict=False)
        heads = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias, **dict(parts)}
        facts |= {prefix + name: _told(x) for name, x in heads.items()}

    def of_the_batch() -> dict[str, str]:
        return {f"{name} of the first call": _values(x) for name, x in tensors.items()}

    agree(shards, facts, of_the_batch, problem)
    down = None if policy.lora is None else policy.lora[0]
    hidden, down = replicated(shards, checks.floating("hidden", policy.hidden), down)
    if policy.lora is not None:
        policy = policy._replace(lora=(down, *policy.lora[1:]))
    return shards, policy._replace(hidden=hidden), reference


def _told(x: object) -> str:
    """What the ranks must have alike of an argument, but for the values and rows of a tensor."""
    if not isinstance(x, Tensor):
        return repr(x)
    return f"{x.dtype}{' with' if x.requires_grad else ' without'} gradient"


def _values(x: object) -> str:
    """The shape of floating values, which the ranks may have rounded apart; of others all."""
    if not isinstance(x, Tensor):
        return repr(x)
    told = f"shape {list(x.shape)}"
    if x.dtype.is_floating_point and x.dim():
        return told
    digest = hashlib.sha256(repr(x.detach().cpu().tolist()).encode()).hexdigest()
    return f"{told} of values {digest[:8]}"


def _dtensor() -> Any:
    """`DTensor`, where something has imported it: else no tensor is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def _group_of(vocab_group: Any, weight: object) -> Any:
    """The group that was given, or that of a weight which is a sharded DTensor."""
    if vocab_group is not None or not isinstance(weight, _dtensor()):
        return vocab_group
    _check_placed("weight", weight, sharded=True)
    return weight.device_mesh.get_group()  # type: ignore[attr-defined]


def _check_placed(name: str, x: Any, *, sharded: bool) -> None:
    placement = x.placements[0]
    good = placement.is_shard(0) if sharded else placement.is_replicate()
    if len(x.placements) != 1 or not good:
        wanted = "Shard(0)" if sharded else "Replicate()"
        raise ValueError(
            f"{name}, a DTensor, must be placed as [{wanted}] on a mesh of one dimension, got "
            f"{list(x.placements)} on one of {x.device_mesh.ndim}"
        )


def _own(name: str, x: Any, *, sharded: bool) -> Any:
    if not isinstance(x, _dtensor()):
        return x
    _check_placed(name, x, sharded=sharded)
    return x.to_local()


def _local(head: GivenHead, prefix: str) -> GivenHead:
    """This rank's part of DTensors; its gradient goes back as a DTensor."""
    hidden, weight, bias, lora = head
    if isinstance(lora, (list, tuple)) and len(lora) == 3:
        lora = (
            _own("lora[0]", lora[0], sharded=False),
            _own("lora[1]", lora[1], sharded=True),
            lora[2],
        )
    return GivenHead(
        _own(prefix + "hidden", hidden, sharded=False),
        _own(prefix + "weight", weight, sharded=True),
        _own(prefix + "bias", bias, sharded=True),
        lora,
    )
