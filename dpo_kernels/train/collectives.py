"""Whether the ranks' gradients meet, asked once before the first step, of two pairs.

First every rank runs the same two pairs, as its share of one sum. Reduced over the ranks that is
the gradient which each of them has alone, before anything is reduced: a reduction that is made
twice shows. Then the pairs are split, one a rank. That is the same gradient again: a reduction that
is left out shows. Norms are compared unit by unit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import TokenRow
from ..models.structure import base_model_of, deterministic
from .model import Policy
from .optim import TrainingError
from .ranks import agreed
from .sharded import layers_of

# What two ways to sum the same numbers may differ by, of the norm.
_ROOM = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALF_ROOM = 0.2
_REST = "the rest of the model"


def check_collectives(policy: Policy, pairs: Sequence[TokenRow]) -> None:
    """`TrainingError`, on all ranks, where gradients are not reduced, or more than once."""
    ranks = policy.ranks
    if ranks.data_world < 2:
        return
    alike = [row for row in pairs if len(row.sequences) == len(pairs[0].sequences)]
    two = [alike[0], alike[-1]]
    ranks.at("the check of collectives")
    with deterministic(policy.model):
        alone = _Alone(policy)
        try:
            same = _reduced(policy, two, 1.0 / ranks.data_world)
        finally:
            alone.close()
        mine = two[ranks.data_rank : ranks.data_rank + 1]
        split = _reduced(policy, mine or two[:1], float(bool(mine)))
    wrong = _problems(alone.norms(), same, split, _ROOM.get(policy.dtype, _HALF_ROOM))
    for rank, found in enumerate(ranks.objects(wrong)):
        if found:
            more = f" (and {len(found) - 1} more units)" if len(found) > 1 else ""
            raise agreed(
                TrainingError(
                    f"step 1, rank {rank}: the gradients of the ranks do not meet as they should: "
                    f"{found[0]}{more}"
                )
            )


def _problems(
    alone: dict[str, float], same: dict[str, float], split: dict[str, float], room: float
) -> list[str]:
    found = []
    for unit, wanted in alone.items():
        a, b = same[unit], split[unit]
        if not abs(a - wanted) <= room * wanted:
            why = "made twice" if a > wanted else "left out, or never reached the weights"
            found.append(
                f"{unit}: all ranks ran the same pairs, and the gradient's norm is {a:.4g} over "
                f"them where each alone has {wanted:.4g}: a reduction is {why}"
            )
        elif not abs(b - a) <= room * a:
            found.append(
                f"{unit}: the gradient's norm is {b:.4g} with the pairs split over the ranks, and "
                f"{a:.4g} with both on each: a reduction is left out"
            )
    return found


def _names_of_units(policy: Policy) -> dict[str, nn.Module]:
    """The parts that are reduced on their own, by name; "" is what is in no other."""
    base = base_model_of(policy.model)
    parts = policy.sharded.units or [*layers_of(base), base.get_output_embeddings()]
    named = {id(m): n for n, m in policy.model.named_modules()}
    return {named[id(m)]: m for m in parts} | {"": policy.model}


def _unit_of(name: str, units: dict[str, Any]) -> str:
    """The innermost unit of a weight."""
    return max((u for u in units if not u or name.startswith(u + ".")), key=len)


class _Alone:
    """Norms, by unit, of the gradient that this rank forms, before it is reduced."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.units = policy, _names_of_units(policy)
        self.squares: dict[int, tuple[str, Tensor]] = {}
        self.handles: list[Any] = []
        for name, module in self.units.items():
            if policy.sharded.is_sharded:
                # Whole weights are there while the unit runs: FSDP's hook comes before this one.
                hook = functools.partial(self._listen, name)
                self.handles.append(module.register_forward_pre_hook(hook))
            else:
                self._listen(name, module)

    def _listen(self, unit: str, module: nn.Module, _: Any = None) -> None:
        for name, p in module.named_parameters(unit):
            mine = _unit_of(name, self.units) == unit
            if not mine or not p.requires_grad or hasattr(p, "full_tensor"):
                continue
            if id(p) not in self.squares:
                zero = torch.zeros((), dtype=torch.float64, device=p.device)
                self.squares[id(p)] = (unit, zero)
                self.handles.append(p.register_hook(functools.partial(_add_square, zero)))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def norms(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for unit, square in self.squares.values():
            found[unit or _REST] = found.get(unit or _REST, 0.0) + float(square)
        # FSDP takes the mean of shares that were scaled up; whole models add up their shares.
        scale = 1.0 if self.policy.sharded.is_sharded else float(self.policy.ranks.data_world)
        return {unit: scale * square**0.5 for unit, square in found.items()}


def _add_square(total: Tensor, g: Tensor) -> None:
    total.add_(g.detach().double().square().sum())


def _reduced(policy: Policy, pairs: list[TokenRow], share: float) -> dict[str, float]:
    """Norms, by unit, of the gradient of these pairs' log-probs, summed over the ranks."""
    sharded, units = policy.sharded, _names_of_units(policy)
    with sharded.micro_batch(True):
        logps = policy.logps(policy.batch(pairs))
        (logps.sum() * (share * sharded.scale)).backward()
    sharded.meet()
    sharded.rest()
    world = policy.ranks.world
    places = {unit: i for i, unit in enumerate(units)}
    squares = torch.zeros(len(units), dtype=torch.float64, device=policy.device)
    cut = {id(p) for p in sharded.cut}
    for name, p in policy.model.named_parameters():
        if p.grad is None:
            continue
        if id(p) in cut:  # rows of a head, which no rank has the whole gradient of to compare
            p.grad = None
            continue
        grad: Any = p.grad
        held = world  # copies of each number
        if hasattr(grad, "full_tensor"):
            sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
            for placement, size in sizes:
                held //= size if placement.is_shard() else 1
            grad = grad.to_local()
        squares[places[_unit_of(name, units)]] += grad.double().square().sum() / held
        p.grad = None
    dist.all_reduce(squares)
    values = squares.sqrt().tolist()
    return {unit or _REST: values[i] for unit, i in places.items()}
