"""A policy's weights over the ranks: sharded by FSDP2, or whole on each with gradients summed.

    sharded = shard(policy.model, config, ranks)
    with sharded.micro_batch(last):     # forward and backward; gradients meet in the last
        ...
    sharded.meet()                      # sums of what is not sharded
    sharded.rest()                      # weights in shards: what names and states are read of

A layer is a unit. The head is one of its own where it has weights of its own, so that it is
gathered once a step and its gradient is reduced once; tied to the embedding it is in the root.
Losses are scaled so that the mean over the ranks, which FSDP takes, is the sum of their shares.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.structure import base_model_of, trunk_of
from .config import DPOTrainConfig, UserError
from .ranks import ALONE, Ranks


class Sharded:
    """How one model's weights and gradients are over the ranks; of one process: not at all."""

    def __init__(
        self,
        model: nn.Module | None = None,
        ranks: Ranks = ALONE,
        units: Sequence[Any] = (),
        lasting: Sequence[Any] = (),
        cut: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model, self.ranks = model, ranks
        self.units = units  # all FSDP modules
        self.cut = cut  # the head's, whose rows the ranks of a group share
        self.lasting = lasting  # those that stay whole from the first micro-batch to the last

    @property
    def in_parts(self) -> bool:
        """Whether no rank has all weights."""
        return bool(self.units or self.cut)

    @property
    def is_sharded(self) -> bool:
        return bool(self.units)

    @property
    def scale(self) -> float:
        """What a share of the loss is multiplied by before its backward."""
        return float(self.ranks.data_world) if self.units else 1.0

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if self.units:
            root: Any = self.model
            root.set_requires_gradient_sync(last)
            root.set_is_last_backward(last)
            for unit in self.lasting:
                unit.set_reshard_after_backward(last, recurse=False)
        yield

    def meet(self, extra: Iterable[nn.Parameter] = ()) -> None:
        """Sum the gradients that FSDP does not: of whole models, and of `extra` parameters."""
        if self.ranks.data_world == 1:
            return
        assert self.model is not None
        for p in self.cut:
            self._meet_rows(p)
        cut = {id(p) for p in self.cut}
        trained = [p for p in self.model.parameters() if p.requires_grad and id(p) not in cut]
        mine = [] if self.units else trained
        for kind, given in _by_dtype([*mine, *extra]).items():
            for p in given:  # a rank without a part of the step has none
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            flat = torch.cat([p.grad.reshape(-1) for p in given if p.grad is not None])
            wide = flat.to(torch.promote_types(kind, torch.float32))
            dist.all_reduce(wide, group=self.ranks.data_group)
            parts = wide.to(kind).split([p.numel() for p in given])
            for p, part in zip(given, parts, strict=True):
                assert p.grad is not None
                p.grad.copy_(part.view_as(p))

    def _meet_rows(self, p: nn.Parameter) -> None:
        """Sum the gradient of this rank's rows over the ranks that have the same rows."""
        if not p.requires_grad:
            return
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grad: Any = p.grad
        local = grad.to_local()
        wide = local.to(torch.promote_types(local.dtype, torch.float32))
        dist.all_reduce(wide, group=self.ranks.data_group)
        local.copy_(wide / self.scale)

    def gather(self) -> None:
        """The weights outside of the layers: a forward that PEFT begins below the root has them."""
        for unit in self.lasting if self.units else ():
            unit.unshard()

    def rest(self) -> None:
        """Let go of what a forward without a backward has gathered."""
        for unit in self.units:
            unit.reshard()

    def whole_state(self) -> dict[str, Tensor] | None:
        """Every weight and buffer, whole and on the host, by name; on the first rank alone."""
        self.rest()
        assert self.model is not None
        found: dict[str, Tensor] = {}
        # One tensor for weights that are tied, as transformers looks for them.
        owner = {n: id(p) for n, p in self.model.named_parameters(remove_duplicate=False)}
        seen: dict[int, str] = {}
        for name, x in self.model.state_dict().items():
            first = seen.setdefault(owner.get(name, id(x)), name)
            if first == name:
                x = x.detach()
                x = x.full_tensor() if hasattr(x, "full_tensor") else x
                if self.ranks.first:
                    found[name] = x.cpu()
            elif self.ranks.first:
                found[name] = found[first]
        return found if self.ranks.first else None


def _by_dtype(parameters: Iterable[nn.Parameter]) -> dict[torch.dtype, list[nn.Parameter]]:
    found: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in parameters:
        found.setdefault(p.dtype, []).append(p)
    return found


def shard(model: nn.Module, config: DPOTrainConfig, ranks: Ranks) -> Sharded:
    """Shard `model` in place as `fsdp` says."""
    cut = _cut_head(model, ranks)
    if not ranks.many or config.fsdp == "none":
        return Sharded(model, ranks, cut=cut)
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = _mesh(config, ranks)
    base = base_model_of(model)
    head = base.get_output_embeddings()
    embedding = base.get_input_embeddings()
    options: dict[str, Any] = {"mesh": mesh}
    if next(base.parameters()).dtype in (torch.bfloat16, torch.float16):
        options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in layers_of(base):
        fully_shard(layer, **options)
    tied = {id(p) for p in embedding.parameters()}
    lasting: list[Any] = [model]
    if cut:
        options["ignored_params"] = set(cut)
    elif not any(id(p) in tied for p in head.parameters()):
        fully_shard(head, reshard_after_forward=False, **options)
        lasting.append(head)
    fully_shard(model, reshard_after_forward=False, **options)
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    return Sharded(model, ranks, units, lasting, cut)


def _cut_head(model: nn.Module, ranks: Ranks) -> list[nn.Parameter]:
    """Leave this rank its rows of the head, where ranks share it by vocabulary."""
    if ranks.vocab_mesh is None:
        return []
    from torch.distributed.tensor import Shard, distribute_tensor

    base = base_model_of(model)
    head = base.get_output_embeddings()
    tied = {id(p) for p in base.get_input_embeddings().parameters()}
    if type(head) is not nn.Linear or any(id(p) in tied for p in head.parameters()):
        raise UserError(
            "vocab_parallel: the head must be a linear layer of its own: not tied to the "
            f"embedding, without an adapter; {type(base).__name__} has another"
        )
    for name, p in list(head.named_parameters()):
        rows = distribute_tensor(p.detach(), ranks.vocab_mesh, [Shard(0)])
        setattr(head, name, nn.Parameter(rows, requires_grad=p.requires_grad))
    return list(head.parameters())


def layers_of(base: Any) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules of one class in the trunk."""
    lists = [m for m in trunk_of(base).modules() if isinstance(m, nn.ModuleList)]
    same = [x for x in lists if len({type(m) for m in x}) == 1]
    if not same:
        raise UserError(f"fsdp: {type(base).__name__} has no list of layers; use fsdp=none")
    longest = same[0]
    for one in same[1:]:
        longest = one if len(one) > len(longest) else longest
    return list(longest)


def _mesh(config: DPOTrainConfig, ranks: Ranks) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    assert ranks.device is not None
    kind = ranks.device.type
    if config.fsdp != "hybrid_shard":
        return init_device_mesh(kind, (ranks.world,), mesh_dim_names=("shard",))
    size = shard_size(config, ranks)
    shape = (ranks.world // size, size)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def shard_size(config: DPOTrainConfig, ranks: Ranks) -> int:
    """Ranks of a group that shards the weights under hybrid_shard."""
    if config.fsdp != "hybrid_shard":
        return ranks.world
    size = config.fsdp_shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if ranks.world % size:
        raise UserError(
            f"fsdp_shard_size: {ranks.world} processes do not divide into groups of {size}"
        )
    return size
